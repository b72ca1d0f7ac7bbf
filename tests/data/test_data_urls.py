"""Shards that come through a command or from a web server: the same records, and no end that is not the end."""

from __future__ import annotations

import logging
import os
import pickle
import random
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megavg.data import urls
from megavg.data.order import bytes_held, shuffled
from megavg.data.sample import SampleError
from megavg.data.shards import PromptSource, expand_shards, iterate_all
from megavg.data.tars import read_records, walk_shards
from megavg.data.urls import TransportError, is_url
from tests.data.all_ranks import keys

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset fetches http with curl")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(urls, "RETRY_SECONDS", 0.01)


class Server:
    """A web server for ``folder`` on a free port of this machine, in a thread.

    Attributes:
        cuts: of the next requests: bytes of the body after which the connection is closed; None sends all. When it is
            empty, ``cut_always`` holds.
        requests: paths asked for, in their order.
    """

    def __init__(self, folder):
        self.cuts, self.cut_always, self.requests = [], None, []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                owner.requests.append(self.path)
                path = os.path.join(folder, self.path.lstrip("/"))
                if not os.path.isfile(path):
                    return self.send_error(404)
                cut = owner.cuts.pop(0) if owner.cuts else owner.cut_always
                with open(path, "rb") as file:
                    data = file.read()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[:cut])

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def served(shard_set):
    """40 samples in 6 shards, and a server of their folder."""
    folder = shard_set(40, 7)
    server = Server(folder)
    yield folder, server
    server.close()


def contents(samples) -> list[tuple]:
    return [(s.key, s.expression, s.boxes_xyxy_px, s.meta, s.image.tobytes()) for s in samples]


def batches(shards, count: int = 8, **options) -> list:
    with PromptSource(shards, 12, 7, shuffle_buffer=9, **options) as source:
        return [contents(source.next_batch()) for _ in range(count)]


def test_what_is_a_url():
    assert all(map(is_url, ["pipe:cat a.tar", "http://host/a.tar", "https://host/a.tar", "gs://bucket/a.tar"]))
    assert not any(map(is_url, ["a.tar", "/data/a.tar", "data/{0..3}.tar", "C:/a.tar", "a:b.tar", "./pipe"]))


def test_urls_are_listed_with_brace_ranges_and_nothing_is_fetched():
    assert expand_shards("http://nowhere/t-{000..002}.tar") == [f"http://nowhere/t-{i:03d}.tar" for i in range(3)]
    assert expand_shards(["pipe:false {a,b}", "pipe:false b"]) == ["pipe:false a", "pipe:false b"]
    assert expand_shards("pipe:awk '{print $1}' list") == ["pipe:awk '{print $1}' list"]
    PromptSource("http://nowhere/t-{000..002}.tar", 4, 0)


@needs_curl
def test_the_same_samples_in_the_same_order_from_files_commands_and_a_server(served):
    folder, server = served
    names = "train-{000000..000005}.tar"
    expected = batches(f"{folder}/{names}")
    assert batches(f"pipe:cat {folder}/{names}") == expected
    assert batches(f"{server.url}/{names}") == expected
    assert batches(f"{server.url}/{names}", num_workers=1) == expected
    assert contents(iterate_all(f"{server.url}/{names}")) == contents(iterate_all(folder))
    sample = next(iterate_all(f"{server.url}/{names}"))
    assert sample.shard == f"{server.url}/train-000000.tar", "the sample tells where it comes from"


def test_a_position_in_urls_is_resumed_by_other_ranks_and_belongs_to_their_text(served):
    folder, _ = served
    shards = [f"pipe:cat {folder}/train-00000{i}.tar" for i in range(6)]
    expected = batches(shards)
    source = PromptSource(shards, 12, 7, shuffle_buffer=9)
    for _ in range(5):
        source.next_batch()
    ranks = [PromptSource(shards, 12, 7, rank, 3, shuffle_buffer=9) for rank in range(3)]
    for rank, source_of_rank in enumerate(ranks):
        source_of_rank.load_state_dict(source.state_dict())
        assert [contents(source_of_rank.next_batch()) for _ in range(3)] == [b[rank::3] for b in expected[5:]]
    for other, words in ((PromptSource([s.replace("cat", "cat ") for s in shards], 12, 7, shuffle_buffer=9), "shards"),
                         (PromptSource(shards, 12, 7, shuffle_buffer=9, shuffle_bytes=10000), "shuffle_bytes")):
        with pytest.raises(ValueError, match=f"another order of samples .*{words}: saved"):
            other.load_state_dict(source.state_dict())


@needs_curl
@pytest.mark.parametrize("cuts", [[0], [1], [700], [1024], [5000], [5000, 9000], [9000, 300, 9000]])
def test_a_cut_connection_is_fetched_again_and_nothing_is_lost_or_repeated(served, cuts, caplog):
    folder, server = served
    server.cuts = list(cuts)
    expected = contents(iterate_all(f"{folder}/train-000000.tar"))
    assert contents(iterate_all(f"{server.url}/train-000000.tar")) == expected
    assert len(server.requests) == len(cuts) + 1
    assert sum("trying again" in entry.getMessage() for entry in caplog.records) == len(cuts)


@needs_curl
def test_a_connection_that_is_always_cut_is_a_torn_shard_that_no_option_leaves_out(served):
    folder, server = served
    server.cut_always = os.path.getsize(f"{folder}/train-000000.tar") - 1  # of the padding, after the last record
    for on_error in ("raise", "skip"):
        server.requests.clear()
        seen = []
        with pytest.raises(TransportError, match="exit status 18 .connection cut") as caught:
            for sample in iterate_all(f"{server.url}/train-000000.tar", on_error):
                seen.append(sample.key)
        assert caught.value.reason == "torn shard" and f"{server.url}/train-000000.tar" in str(caught.value)
        assert "attempt 4, after 6 records" in str(caught.value)
        assert seen == [f"s{i:05d}" for i in range(6)], "not the last one: what follows it might have been part of it"
        assert len(server.requests) == urls.ATTEMPTS
        source = PromptSource([f"{server.url}/train-000000.tar", folder], 12, 0, on_error=on_error)
        for _ in range(2):
            with pytest.raises(TransportError, match="exit status 18"):
                for _ in range(9):
                    source.next_batch()


@needs_curl
def test_errors_that_no_repetition_mends(served):
    _, server = served
    with pytest.raises(TransportError, match=f"{server.url}/none.tar.*exit status 22 .*404.*attempt 1, after 0"):
        next(read_records(f"{server.url}/none.tar"))
    assert server.requests == ["/none.tar"]
    server.close()
    with pytest.raises(TransportError, match="exit status 7 .could not connect.*attempt 4"):
        next(read_records(f"{server.url}/train-000000.tar"))
    with pytest.raises(TransportError, match="nothing://x.*cannot be opened.*no gopen handler"):
        next(read_records("nothing://x"))


@needs_curl
def test_a_page_instead_of_a_tar_is_torn(served):
    folder, server = served
    with open(f"{folder}/page.tar", "w") as file:
        file.write("<html>log in first</html>" * 400)
    with pytest.raises(SampleError, match="page.tar: torn shard: not a whole uncompressed tar") as caught:
        list(read_records(f"{server.url}/page.tar"))
    assert not isinstance(caught.value, TransportError)


def test_the_exit_status_of_a_command_counts_even_after_a_whole_tar(served):
    folder, _ = served
    path = f"{folder}/train-000000.tar"
    for command, words in ((f"cat {path}; exit 3", "command ended with exit status 3; try it by hand .attempt 4"),
                           ("no-such-command-here", "exit status 127 .command not found.*attempt 1"),
                           (f"cat {path}; kill -9 $$", "ended by signal 9.*attempt 4")):
        with pytest.raises(TransportError, match=words) as caught:
            list(read_records(f"pipe:{command}"))
        assert f"pipe:{command}" in str(caught.value)


def test_a_command_that_fails_once_is_run_again_and_its_records_are_not_repeated(served, tmp_path):
    folder, _ = served
    path, mark = f"{folder}/train-000000.tar", tmp_path / "mark"
    once = f"pipe:if test -e {mark}; then cat {path}; else touch {mark}; head -c 5000 {path}; exit 5; fi"
    assert [found.key for found in read_records(once)] == [found.key for found in read_records(path)]


def test_a_shard_that_is_another_one_at_the_second_attempt_is_refused(served, tmp_path):
    folder, _ = served
    mark = tmp_path / "mark"
    with pytest.raises(TransportError, match="holds something else than at the first attempt: 's00008' instead of"):
        list(read_records(f"pipe:if test -e {mark}; then cat {folder}/train-000001.tar; else touch {mark}; "
                          f"head -c 9000 {folder}/train-000000.tar; exit 5; fi"))


def test_a_torn_tar_through_a_command_is_skipped_as_a_torn_file_is(shard_set, caplog):
    folder = shard_set(40, 10)
    torn = f"{folder}/train-000002.tar"
    os.truncate(torn, os.path.getsize(torn) // 2)
    shards = expand_shards(folder)
    piped = [f"pipe:cat {path}" for path in shards]
    kept = keys(iterate_all(shards, "skip"))
    assert keys(iterate_all(piped, "skip")) == kept and 30 < len(kept) < 40
    with pytest.raises(SampleError, match="pipe:cat .*000002.tar.*torn shard.*on_error='skip'"):
        list(iterate_all(piped))
    source = PromptSource(piped, 6, 0, on_error="skip")
    for _ in range(15):
        source.next_batch()
    assert source.skipped == {"torn shard": 1}


def test_a_stream_cut_anywhere_is_torn_and_never_quietly_short(raw_tar, record):
    path = raw_tar([member for i in range(3) for member in record(f"r{i}")])
    end = 3 * 2 * 2 * 512
    for cut in [*range(0, end + 1, 512), 700, 1300, end + 100]:
        seen = []
        with pytest.raises(SampleError, match="torn shard") as caught:
            for found in read_records(f"pipe:head -c {cut} {path}"):
                seen.append(found)
        assert not isinstance(caught.value, TransportError)
        whole = list(read_records(path))[:len(seen)]
        assert [(f.key, f.index) for f in seen] == [(f.key, f.index) for f in whole]
        assert [{name: span.read() for name, span in f.files.items()} for f in whole] == [f.files for f in seen]
    assert len(list(read_records(f"pipe:head -c {end + 512} {path}"))) == 3


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024, 70000])
def test_members_of_any_size_and_names_longer_than_a_header(raw_tar, size):
    data = random.Random(size).randbytes(size)
    long = "folder/" + "k" * 150
    path = raw_tar([("a.json", data), ("a.png", b"x" * 100), (f"{long}.json", b"y"), (f"{long}.cls.txt", data),
                    (f"{long}.png", data), ("__meta__/x.json", b"1"), ("z.json", data)])
    local, piped = list(read_records(path)), list(read_records(f"pipe:cat {path}"))
    assert [found.key for found in local] == [found.key for found in piped] == ["a", long, "z"]
    read = [{suffix: span.read() for suffix, span in found.files.items()} for found in local]
    assert read == [{"json": data, "png": b"x" * 100}, {"json": b"y", "cls.txt": data, "png": data}, {"json": data}]
    kept = [read[0], {**read[1], "cls.txt": b""}, read[2]]  # neither JSON nor a picture
    assert [found.files for found in piped] == kept


def test_the_buffer_is_bounded_in_bytes(raw_tar, record):
    names = [f"r{i:02d}" for i in range(60)]
    path = raw_tar([m for name in names for m in record(name, image=bytes(random.Random(name).randint(1, 9000)))])
    held = most = 0

    def feed():
        nonlocal held, most
        for found in walk_shards([f"pipe:cat {path}"]):
            held += bytes_held(found)
            most = max(most, held)
            yield found

    out = []
    for found in shuffled(feed(), 1000, random.Random(0), 50_000):
        held -= bytes_held(found)
        out.append(found.key)
    assert sorted(out) == names and out != names
    assert 40_000 < most < 50_000 + 9500
    two = [found.key for found in shuffled(walk_shards([f"pipe:cat {path}"]), 1000, random.Random(0), 1)]
    assert sorted(two) == names and all(two.index(name) >= i - 1 for i, name in enumerate(names)), "one and the next"
    local = [found.key for found in shuffled(walk_shards([path]), 1000, random.Random(0), 1)]
    assert max(abs(local.index(name) - i) for i, name in enumerate(names)) > 20, "places in files take no memory"


def test_a_source_that_is_left_ends_its_command(served, tmp_path):
    folder, _ = served
    pid = tmp_path / "pid"
    source = PromptSource(f"pipe:echo $$ > {pid}; cat {folder}/train-000000.tar; exec sleep 60", 4, 0, shuffle_buffer=1)
    source.next_batch()
    number = int(pid.read_text())
    assert os.path.exists(f"/proc/{number}")
    started = time.monotonic()
    source.close()
    assert not os.path.exists(f"/proc/{number}") and time.monotonic() - started < 5


def test_errors_can_be_sent_to_another_process():
    error = pickle.loads(pickle.dumps(TransportError("http://x", "gone", retry=False)))
    assert (str(error), error.retry, error.reason) == ("http://x: torn shard: gone", False, "torn shard")


def test_the_log_says_what_is_tried_again(served, caplog):
    caplog.set_level(logging.WARNING)
    with pytest.raises(TransportError):
        list(read_records("pipe:exit 9"))
    lines = [entry.getMessage() for entry in caplog.records]
    assert len(lines) == urls.ATTEMPTS - 1 and all("pipe:exit 9" in line and "status 9" in line for line in lines)

"""megavg: reinforcement learning under entropy control for visual grounding with Qwen-VL models."""

__version__ = "0.1.0"

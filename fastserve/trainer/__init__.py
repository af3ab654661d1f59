"""For training code: sends new weights to workers while they serve (see docs/live_weights.md)."""

from fastserve.trainer.sender import SendError, Sent, WeightSender

__all__ = ["SendError", "Sent", "WeightSender"]

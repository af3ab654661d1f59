"""The bundled demo model: a small Llama that answers checkable questions with no network and no GPU."""

from pathlib import Path

MODEL_NAME = "fastserve-demo"
MODEL_PATH = Path(__file__).resolve().parent / "model"
ADAPTER_NAMES = ("fastserve-demo-words", "fastserve-demo-capitals")
"""Its LoRA adapters: one answers sums in words, one answers facts in capitals."""


def demo_model_path() -> str:
    """The folder of the model inside the installed package, in Hugging Face layout."""
    return str(MODEL_PATH)


def demo_adapter_path(name: str) -> str:
    """The folder of one of ADAPTER_NAMES inside the installed package."""
    return str(Path(__file__).resolve().parent / "adapters" / name)

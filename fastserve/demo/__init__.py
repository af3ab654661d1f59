"""The bundled demo model: a small Llama that answers checkable questions with no network and no GPU."""

from pathlib import Path

MODEL_NAME = "fastserve-demo"
MODEL_PATH = Path(__file__).resolve().parent / "model"


def demo_model_path() -> str:
    """The folder of the model inside the installed package, in Hugging Face layout."""
    return str(MODEL_PATH)

"""A second witness for GPTQ: gptqmodel's own loader. It is no dependency (docs/decisions/0012-loading.md), so this runs
only where it is installed: `pip install gptqmodel`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from fastserve.demo import demo_model_path

from .conftest import logits_of
from .packers import write_packed
from .test_formats import SIZES, gptq_packer, load, save


@pytest.mark.parametrize(
    ("bits", "group", "shuffled", "v2"),
    [(4, 32, False, False), (4, 32, True, True), (3, 32, True, False), (8, -1, False, True)],
)
def test_gptqmodel_reads_the_same_weights(tmp_path: Path, bits: int, group: int, shuffled: bool, v2: bool) -> None:
    gptqmodel: Any = pytest.importorskip("gptqmodel")
    settings = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": shuffled, "sym": False, "lm_head": False,
        "checkpoint_format": "gptq_v2" if v2 else "gptq", "meta": {"quantizer": ["gptqmodel:5.0.0"]},
    }  # fmt: skip
    write_packed(
        save(LlamaConfig(**SIZES), tmp_path / "base"), tmp_path / "packed",
        gptq_packer(bits, group, shuffled=shuffled, v2=v2), settings,
    )  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):  # it does not start without one
        shutil.copy(Path(demo_model_path()) / name, tmp_path / "packed")
    theirs = gptqmodel.GPTQModel.load(
        str(tmp_path / "packed"), device="cpu", dtype=torch.float16, backend=gptqmodel.BACKEND.GPTQ_TORCH
    ).model
    ours = load(tmp_path / "packed", "float16")
    tokens = torch.randint(2, 160, (1, 17), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = theirs(input_ids=tokens, use_cache=False).logits[0].float()
    found = logits_of(ours, tokens[0].tolist()).float()
    # It multiplies in 16 bits. A zero point that is wrong by one moves logits by their own size.
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()

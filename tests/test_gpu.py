"""bench/gpu.py without a GPU: all that runs on the CPU too, at tiny sizes."""

import pytest
import torch

from bench import gpu

SLOW = ("Tests that need CUDA", "A whole command", "All cores", "JAX")  # which start Python anew


@pytest.mark.parametrize("name", [name for name in gpu.PARTS if name not in SLOW])
def test_a_part_passes_on_the_cpu(name, capfd, monkeypatch):
    monkeypatch.setattr(gpu, "algorithms", lambda: ("maml++", "directed-sharp-maml", "imaml"))
    try:
        gpu.main(["--device", "cpu", "--small", "--part", name])
    finally:
        torch.set_default_dtype(torch.float32)
    assert capfd.readouterr().out


def test_a_part_that_fails_or_takes_too_long_is_named_and_what_it_printed_kept(tmp_path, monkeypatch, capsys):
    ends = {"First": ("| a row |", "by 0.1"), "Second": ("", "not done after 5 s"), "Third": ("all is well", "")}
    monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(ends, (gpu.check_checkpoints, 5)))
    monkeypatch.setattr(gpu, "run_part", lambda name, words, seconds: ends[name])
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path / "gpu.md")])
    text = (tmp_path / "gpu.md").read_text()
    assert stop.value.code == 1 and "Failed: First, Second." in capsys.readouterr().out
    assert all(x in text for x in ("| a row |", "by 0.1", "not done after 5 s", "all is well"))


def test_a_part_has_a_process_of_its_own_and_a_time_limit():
    out, why = gpu.run_part("A checkpoint moved there and back", ["--device", "nowhere"], 60)
    assert out == "" and "--device" in why
    assert gpu.run_part("A checkpoint moved there and back", ["--device", "cpu"], 0.01)[1].startswith("not done after")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_without_cuda_one_line_says_so(tmp_path):
    with pytest.raises(SystemExit, match="no CUDA device is available to torch"):
        gpu.main(["--out", str(tmp_path / "gpu.md")])
    assert not (tmp_path / "gpu.md").exists()

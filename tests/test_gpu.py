"""bench/gpu.py without a GPU: all that runs on the CPU too, at tiny sizes."""

import pytest
import torch

import run
from bench import gpu


def test_every_part_passes_on_the_cpu_and_is_in_the_file(tmp_path):
    gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path / "gpu.md")])
    text = (tmp_path / "gpu.md").read_text()
    assert "No check failed" in text and "FAILED" not in text
    sections = text.split("\n## ")[1:]
    assert [section.split("\n")[0] for section in sections] == list(gpu.PARTS)
    assert all(f"| {name} |" in sections[1] for name in gpu.FAMILIES)
    assert "| 1 |" in sections[2] and "| 16 |" in sections[2]


def test_a_failed_part_is_named_and_the_others_run(tmp_path, monkeypatch, capsys):
    def differs(device, small, left):
        """Never agrees."""
        raise gpu.CheckError("by 0.1")

    def breaks(device, small, left):
        """Raises."""
        raise run.RunError("no")

    def agrees(device, small, left):
        """Agrees."""
        return "all is well"

    monkeypatch.setattr(gpu, "PARTS", {"First": differs, "Second": breaks, "Third": agrees})
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path / "gpu.md")])
    text = (tmp_path / "gpu.md").read_text()
    assert stop.value.code == 1 and "Failed: First, Second." in capsys.readouterr().out
    assert "by 0.1" in text and "RunError" in text and "all is well" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_without_cuda_one_line_says_so(tmp_path):
    with pytest.raises(SystemExit, match="no CUDA device is available to torch"):
        gpu.main(["--out", str(tmp_path / "gpu.md")])
    assert not (tmp_path / "gpu.md").exists()

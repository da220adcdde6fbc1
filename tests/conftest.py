import pytest
import torch

import report

torch.set_num_threads(1)  # as run.py does: small tensors, and tests that run beside other programs


@pytest.fixture(autouse=True)
def figures_where_they_are_looked_at(request, monkeypatch):
    """Figures take a second each, most of a small training's time: test_report.py draws them, the others do not."""
    if request.module.__name__ != "tests.test_report":
        monkeypatch.setattr(report, "draw_curves", lambda plt, labels, path: None)
        monkeypatch.setattr(report, "draw_thresholds", lambda plt, labels, path: None)
        monkeypatch.setattr(report, "draw_adaptation", lambda plt, labels, path: False)

"""The figures of the suite `paper`: depth, solvers, rewiring, superpixels, parameters."""

import pytest
import torch
from matplotlib.figure import Figure

from bench.core.report import Report
from bench.paper import depth, figures, parameters, superpixels, sweeps
from tests._paper_runs import HEADER, OPTIONS, run_row


def test_depth_is_steps_and_layers(capsys, tmp_path):
    wanted = depth.jobs("depth", OPTIONS)
    for job in wanted:
        if job.model.startswith("GRAND"):
            assert job.preset.T / job.preset.step_size == job.at
            assert (job.preset.method, job.preset.early_stop) == ("rk4", 1.0)
        else:
            assert job.layers == job.at
    shallow = {"GCN": 0.5, "GCN-residual": 0.7}
    runs = [run_row(job.model, job.seed, at=job.at, accuracy=0.8 if job.at < 4
            else shallow.get(job.model, 0.79)) for job in wanted]  # fmt: skip
    report = Report("paper", HEADER)
    depth.show("depth", runs, wanted, report)
    figures = {figure["figure"]: figure["value"] for figure in report.figures}
    assert figures["depth: GRAND-l, accuracy at 32 less its maximum"] == pytest.approx(-1.0)
    assert figures["depth: GCN, accuracy at 32 less its maximum"] == pytest.approx(-30.0)
    assert "79.0 ± 0.0" in capsys.readouterr().out
    depth.draw("depth", runs, wanted, tmp_path / "depth.png")
    assert (tmp_path / "depth.png").stat().st_size > 0


@pytest.mark.parametrize("part", ["solvers", "rewiring"])
def test_sweeps_show_failures(part, capsys, tmp_path):
    wanted = sweeps.jobs(part, OPTIONS)
    keys = {(job.model, job.at) for job in wanted}
    assert len(wanted) == 2 * len(keys) - (part == "solvers")  # the paper's step size runs once
    runs = []
    for job in wanted:
        failed = job.model == "explicit_adams" and (job.at or 0) > 0.5
        runs.append(run_row(job.model, job.seed, at=job.at, diverged=failed,
                            accuracy=None if failed else 0.8))  # fmt: skip
    report = Report("paper", HEADER)
    sweeps.show(part, runs, wanted, report)
    assert "2 of 2" in capsys.readouterr().out
    if part == "solvers":
        figures = {figure["figure"]: figure["value"] for figure in report.figures}
        name = "lowest mean accuracy at any step size less dopri5's"
        assert figures[f"solvers: explicit_adams, {name}"] == pytest.approx(-80.0)
        assert figures[f"solvers: implicit_adams, {name}"] == pytest.approx(0.0)
        # alpha = 1/2: |λ| up to 1, and order 4 is stable below 0.3.
        assert sweeps._stable([run_row("explicit_adams", at=0.2)]) == "yes: below 0.30"
        assert sweeps._stable([run_row("explicit_adams", at=0.5)]) == "no: below 0.30"
    sweeps.draw(part, runs, wanted, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 0


@pytest.mark.parametrize("part", ["solvers", "rewiring"])
def test_sweeps_solve_by_what_their_lines_are_called(part):
    for job in sweeps.jobs(part, OPTIONS):
        assert job.preset.method == job.model
        assert (job.preset.tol_scale is not None) == (job.model in {"dopri5", "implicit_adams"})


def test_bars_are_means_with_the_deviation_of_the_population():
    axis = Figure().subplots()
    own = [
        run_row("GRAND-l", seed, at=2.0, accuracy=value) for seed, value in enumerate((0.8, 0.9))
    ]
    figures._line(axis, own, "test_accuracy", "GRAND-l", "C0")
    ((low, high),) = axis.containers[0][2][0].get_segments()
    assert (low[1], high[1]) == pytest.approx((80.0, 90.0))


def test_rewiring_keeps_k():
    for job in sweeps.jobs("rewiring", OPTIONS):
        assert job.preset.rewiring_top_k == job.at


def test_superpixels(tmp_path):
    pytest.importorskip("skimage")
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    inside = ((rows - 32) ** 2 + (columns - 32) ** 2 < 400).double()
    noise = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)).double()
    image = (0.8 - 0.6 * inside + 0.1 * (noise - 0.5)).numpy()
    cut = superpixels.cut(image, 120)
    data = cut.data
    assert cut.segments.max() + 1 == data.num_nodes
    assert 0.15 < data.y.double().mean() < 0.5  # the disc covers 0.31
    sender, receiver = data.edge_index
    assert (sender != receiver).all()
    found = {name: superpixels.diffuse(name, cut) for name in superpixels.VARIANTS}
    own, laplacian = (found[name][1] for name in ("GRAND-nl", "constant Laplacian"))
    assert own["test_accuracy"] > 0.9
    assert own["boundary_kept"] > laplacian["boundary_kept"]
    assert own["attention_across_over_within"] < laplacian["attention_across_over_within"]
    for diffused, _ in found.values():
        assert diffused.state.min() >= data.x.min() - 1e-5  # equation 3
        assert diffused.state.max() <= data.x.max() + 1e-5
    superpixels.draw_superpixels(
        cut.segments, data, [diffused for diffused, _ in found.values()], tmp_path / "s.png"
    )
    assert (tmp_path / "s.png").stat().st_size > 0


def test_parameters_of_a_configuration():
    row = parameters.count("PubMed", "nl")
    # encoder 500·64 + 64 and 64·3 + 3; queries and keys 2 (3·16 + 16), alpha, beta; no decoder
    assert row["encoder"] == 32_064 + 195
    assert row["diffusion"] == 130
    assert row["decoder"] == 0
    assert row["parameters"] == 32_064 + 195 + 130
    assert parameters.count("ogbn-arxiv", "nl")["paper"] == 70_000
    gcn = parameters.count_peer("PubMed", "nl", "GCN")
    assert gcn["parameters"] == 500 * 64 + 64 + 64 * 3 + 3

import pytest
import torch
from torch import nn

from fxcompress.ir import capture
from fxcompress.testing import golden_text, hash_weights_

pytest_plugins = ["pytester"]

TEST = """
from pathlib import Path

def test_mlp(golden_graph):
    golden_graph(Path(__file__).with_name("mlp.txt").read_text())
"""
PROGRAMS = """
import pytest
import torch
from torch import nn
from fxcompress.ir import capture
from fxcompress.testing import hash_weights_

@pytest.mark.golden("zoo/tiny")
@pytest.mark.parametrize("width", [4])
def test_two(golden_graph, width):
    model = hash_weights_(nn.Sequential(nn.Linear(3, width), nn.ReLU()).eval())
    program = capture(model, (torch.ones(2, 3),))
    golden_graph(program, outputs=False)
    golden_graph(program, name="larger", dims={"batch": 3})
"""


def text(activation=nn.ReLU, width=4, seed=0):
    model = nn.Sequential(nn.Linear(3, width), activation(), nn.Linear(width, 2)).eval()
    return golden_text(capture(hash_weights_(model, seed), (torch.ones(2, 3),), name="Mlp"))


@pytest.fixture(scope="module", autouse=True)
def texts():
    """Make every text once, which also loads all of torch: pytester forgets a run's imports."""
    return {
        "relu": text(),
        "gelu": text(nn.GELU),
        "wide": text(width=5),
        "other weights": text(seed=1),
    }


@pytest.fixture
def project(pytester, monkeypatch, texts):
    monkeypatch.delenv("CI", raising=False)
    pytester.makeini("[pytest]\ntestpaths = tests\n")
    pytester.mkdir("tests")
    write(pytester, texts["relu"])
    return pytester


def write(project, text, test=TEST):
    (project.path / "tests" / "test_models.py").write_text(test)
    (project.path / "tests" / "mlp.txt").write_text(text)


def run(project, *args):
    others = ("cacheprovider", "xdist", "hypothesispytest", "anyio")
    without = [part for name in others for part in ("-p", f"no:{name}")]
    return project.runpytest_inprocess(*without, *args)


def golden(project):
    return project.path / "golden" / "models" / "mlp.fxg"


def test_missing_golden_fails_and_writes_a_proposal(project, texts):
    result = run(project)
    assert result.ret == 1
    assert not golden(project).exists()
    assert golden(project).with_name("mlp.fxg.new").read_text() == texts["relu"]
    result.stdout.fnmatch_lines(["*mlp.fxg is missing*"])


def test_blessing_writes_and_exits_1_then_passes(project, texts):
    run(project)
    assert run(project, "--golden-update=new").ret == 1
    assert golden(project).read_text() == texts["relu"]
    assert not golden(project).with_name("mlp.fxg.new").exists()
    assert run(project).ret == 0


@pytest.fixture
def blessed(project):
    assert run(project, "--golden-update=new").ret == 1
    return project


def test_structure_change_says_so_first_and_is_not_overwritten_by_new(blessed, texts):
    write(blessed, texts["gelu"])
    result = run(blessed, "--golden-update=new")
    assert result.ret == 1
    assert golden(blessed).read_text() == texts["relu"]
    result.stdout.fnmatch_lines(["STRUCTURE changed*"])


def test_changed_is_the_default_update_and_writes_no_missing_file(project):
    assert run(project, "--golden-update").ret == 1
    assert not golden(project).exists()


def test_changed_overwrites(blessed, texts):
    write(blessed, texts["gelu"])
    assert run(blessed, "--golden-update").ret == 1
    assert golden(blessed).read_text() == texts["gelu"]
    assert run(blessed).ret == 0


def test_numbers_only(blessed, texts):
    write(blessed, texts["other weights"])
    result = run(blessed)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["numbers only*"])


def test_numbers_within_tolerance_pass_and_stay_as_spelled(blessed, texts):
    old = texts["wide"]
    line = next(line for line in old.splitlines() if line.strip().startswith("2.bias"))
    mean = next(field for field in line.split() if field.startswith("mean="))
    near = line.replace(mean, f"mean={float(mean[5:]) + 1e-7:.9g}")
    golden(blessed).write_text(old.replace(line, near))
    write(blessed, old)
    assert run(blessed).ret == 0
    write(blessed, old.replace("relu(", "relu6("))
    assert run(blessed, "--golden-update").ret == 1
    assert "relu6(" in golden(blessed).read_text()
    assert near in golden(blessed).read_text()


def test_damaged_golden_is_an_error_that_an_update_mends(blessed, texts):
    golden(blessed).write_text(texts["relu"].replace("graph:", "grph:"))
    result = run(blessed)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*golden file is damaged*"])
    assert run(blessed, "--golden-update").ret == 1
    assert golden(blessed).read_text() == texts["relu"]


def test_refused_under_ci(project, monkeypatch):
    monkeypatch.setenv("CI", "true")
    assert run(project, "--golden-update=all").ret == 4
    assert not golden(project).exists()


def test_stale_golden_fails_a_whole_run_only(blessed):
    stale = blessed.path / "golden" / "gone.fxg"
    stale.write_text(golden(blessed).read_text())
    result = run(blessed)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*stale golden files*", "*gone.fxg"])
    assert run(blessed, "tests/test_models.py").ret == 0
    assert run(blessed, "-k", "mlp").ret == 1
    assert run(blessed, "--golden-update=all").ret == 1
    assert not stale.exists()
    assert run(blessed).ret == 0


def test_foreign_files_are_no_ones_business(blessed):
    blessed.makeini("[pytest]\ntestpaths = tests\ngolden_foreign = specs/*\n")
    (blessed.path / "golden" / "specs").mkdir()
    (blessed.path / "golden" / "specs" / "a.fxg").write_text("")
    assert run(blessed).ret == 0


def test_marker_names_the_file_and_calls_have_names(project, texts):
    write(project, texts["relu"], PROGRAMS)
    assert run(project, "--golden-update=new").ret == 1
    names = sorted(p.name for p in (project.path / "golden" / "zoo").iterdir())
    assert names == ["tiny.fxg", "tiny.larger.fxg"]
    assert "outputs:" not in (project.path / "golden/zoo/tiny.fxg").read_text()
    assert "0 f32[3,4]" in (project.path / "golden/zoo/tiny.larger.fxg").read_text()
    assert run(project).ret == 0


def test_workers_report_what_they_blessed_and_found_stale(project):
    pytest.importorskip("xdist")
    args = ("-n", "1", "-p", "no:cacheprovider")
    assert project.runpytest_subprocess(*args, "--golden-update=new").ret == 1
    (project.path / "golden" / "gone.fxg").write_text(golden(project).read_text())
    result = project.runpytest_subprocess(*args)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*gone.fxg"])

"""A report made by hand, with everything a report can hold."""

from fxcompress.pipeline.figures import Heatmap
from fxcompress.report.model import (
    ArtifactRow,
    Bar,
    Card,
    Chart,
    ConstraintRow,
    DeclinedRow,
    Edge,
    EpochRow,
    Histogram,
    LatencyRow,
    ModuleNode,
    Pareto,
    PassFigures,
    PassRow,
    Point,
    Provenance,
    Report,
    SensitivityRow,
    Totals,
    Training,
    UnionGraph,
    UnionNode,
)

BEFORE = Totals(nodes=8, parameters=25_557_032, macs=4_089_184_256, bytes=102_228_128,
                activation_peak=9_633_792)  # fmt: skip
AFTER = BEFORE.model_copy(update={"bytes": 25_800_000, "nodes": 10})
CARDS = (
    Card(label="weights", value="24.6 MiB", detail="was 97.5 MiB (−74.8%)", grade="good"),
    Card(label="MACs", value="4.09 G", detail="unchanged"),
    Card(label="accuracy", value="97.8", detail="was 98.0 (−0.2)", grade="good"),
    Card(label="output error", value="0.32", detail="max|Δ| / range", grade="warn"),
    Card(label="constraints", value="1 / 2", detail="size, metric drop", grade="bad"),
)
CONSTRAINTS = (
    ConstraintRow(name="size", limit="≤ 25%", value="25.2%", met=False),
    ConstraintRow(name="metric drop", limit="≤ 1.0%", value="0.2%", met=True),
)
PASSES = (
    PassRow(index=0, id="input model", use="", totals=BEFORE, metric=98.0, error=0.0,
            sqnr_db=float("inf"), cosine=1.0),
    PassRow(index=1, id="fold_batchnorm", use="tidy.fold_batchnorm", totals=BEFORE,
            error=4.1e-7, sqnr_db=130.2, cosine=1.0, metric=98.0, seconds=0.18,
            proof="exact", summary="52 BatchNorms folded", edits={"remove-node": 52},
            declined=(DeclinedRow(node="layer1.0.bn1",
                                  reason="its input <conv> has 2 users"),)),
    PassRow(index=2, id="static", use="quantize.static", totals=AFTER, error=3.2e-1,
            sqnr_db=15.3, cosine=0.99, metric=97.8, seconds=121.7, proof="approximate",
            summary="54 layers", edits={"add-node": 54, "change-node": 53},
            notes=("32 batches of calibration",)),
)  # fmt: skip
TRAINING = Training(
    id="fine_tune",
    kept=(1,),
    epochs=tuple(
        EpochRow(
            place=n,
            label=str(n + 1),
            step=19 * (n + 1),
            loss=1.5 / (n + 1),
            lr=0.01 / (n + 1),
            terms={"hard_labels": 1.0 / (n + 1), "soft_labels": 0.5 / (n + 1)},
            metric=90.0 + n,
            throughput=8123.4,
        )
        for n in range(3)
    ),
)
FIGURES = PassFigures(
    id="bits",
    heatmaps=(
        Heatmap(
            title="Sensitivity per layer and bits",
            note="noise over signal of the outputs",
            columns=("2 bits", "4 bits", "8 bits", "float"),
            rows=("conv1", "layer1.0.<conv>", "fc"),
            values=((0.31, 2.1e-2, 4e-5, 0.0), (0.9, 1e-1, 3e-4, 0.0), (None, 2e-3, 8e-9, None)),
            chosen=(1, 3, 1),
            sizes=(1200, 147_456, 9_000),
        ),
    ),
)
CHARTS = (
    Chart(title="Parameters", unit="elements", omitted=3,
          bars=(Bar(label="layer4.0.conv2", before=2359296, after=1179648),
                Bar(label="layer4.0.downsample.0.with.a.name", before=2e6, after=2e6),
                Bar(label="gone", before=5e5, after=None))),
    Chart(title="MACs", unit="MACs", bars=(Bar(label="stem", before=1.18e8, after=1e8),)),
)  # fmt: skip


def graph(blocks: int = 2) -> UnionGraph:
    """Return a chain of residual blocks, each with a removed norm and an added quantiser."""
    nodes = [_node("x", "input", "io", "same", "")]
    edges: list[Edge] = []

    def add(node: UnionNode, *sources: int, status: str = "same") -> int:
        nodes.append(node)
        for source in sources:
            edges.append(Edge(source=source, target=len(nodes) - 1, status=status))
        return len(nodes) - 1

    last = 0
    for i in range(blocks):
        scope = f"layer{i // 4}.{i % 4}"
        quant = add(
            _node(f"{scope}.fq", "fake_quant", "quant", "added", scope), last, status="added"
        )
        conv = add(_node(f"{scope}.conv", "conv2d", "weight", "changed", scope), quant)
        norm = add(
            _node(f"{scope}.bn", "batch_norm", "norm", "removed", scope), conv, status="removed"
        )
        relu = add(_node(f"{scope}/relu", "relu", "act", "same", scope), conv)
        edges.append(Edge(source=norm, target=relu, status="removed"))
        last = add(_node(f"{scope}/add", "add", "math", "same", scope), relu, last)
    add(_node("output", "output", "io", "same", ""), last)
    paths = {f"layer{i // 4}" for i in range(blocks)} | {
        f"layer{i // 4}.{i % 4}" for i in range(blocks)
    }
    modules = tuple(
        ModuleNode(path=path, cls="Block",
                   nodes=sum(_below(n.scope, path) for n in nodes),
                   **{s: sum(_below(n.scope, path) and n.status == s for n in nodes)
                      for s in ("added", "changed", "removed")})
        for path in sorted(paths)
    )  # fmt: skip
    return UnionGraph(nodes=tuple(nodes), edges=tuple(edges), modules=modules,
                      added=blocks, changed=blocks, removed=blocks)  # fmt: skip


def _below(scope: str, path: str) -> bool:
    return scope == path or scope.startswith(f"{path}.")


def _node(name: str, op: str, kind: str, status: str, scope: str) -> UnionNode:
    line = f"%{name} = {op}(%x) : f32[batch,64,16,16]"
    return UnionNode(id=name, op=op, kind=kind, type="batch×64×16×16", status=status, scope=scope,
                     text="" if status == "removed" else line,
                     before=line if status in ("changed", "removed") else "")  # fmt: skip


def report(blocks: int = 2, title: str = "ResNet50 · fold_batchnorm → static") -> Report:
    """Return a full report of a graph of so many blocks."""
    return Report(
        title=title,
        provenance=Provenance(
            model="torchvision:resnet50", model_hash="9c1e77d0" * 8, spec="r50-w8.yaml",
            spec_hash="a41c09e2" * 8, result_hash="1f03be77" * 8, date="2026-11-21T17:40Z",
            versions={"fxcompress": "0.1.0", "torch": "2.13.0"}, seed=0,
        ),
        cards=CARDS,
        constraints=CONSTRAINTS,
        metric_name="accuracy",
        passes=PASSES,
        trainings=(TRAINING,),
        figures=(FIGURES,),
        graph=graph(blocks),
        charts=CHARTS,
        sensitivity=(SensitivityRow(node="conv1", sqnr_db=18.0),
                     SensitivityRow(node="fc", sqnr_db=float("inf"))),
        pareto=Pareto(cost_label="MACs", metric_label="accuracy",
                      points=(Point(label="a", cost=1.0, metric=90.0),
                              Point(label="b", cost=2.0, metric=95.0, chosen=True))),
        histograms=(Histogram(name="conv1.weight", low=-1.0, high=1.0, before=(1, 4, 9, 4, 1),
                              after=(0, 5, 9, 5, 0)),),
        latency=(LatencyRow(runtime="onnxruntime", original_ms=31.2, result_ms=6.4,
                            original_spread=0.03, result_spread=0.05),),
        artifacts=(ArtifactRow(format="onnx", path="artifacts/model.onnx", bytes=25_900_000,
                               sha256="ab" * 32, check="equal: max|Δ| 1.2e-06, cosine 1.000000",
                               notes=("53 of 53 convolutions run as integer kernels",)),),
        notes=("dropout is off",),
        spec_text="fxcompress: 1\npasses: []\n",
        lock='{"format": 1}',
    )  # fmt: skip

"""Ray Data reads contexts, solves them with what the page says, and writes: the answers are those of one process."""

import os
import shutil
import sys
import tempfile

import numpy as np
import pytest
from test_docs import DOCS, blocks

import amortized


@pytest.fixture
def cluster():
    """On this machine, of four processes: two solve, the others read and write."""
    before = dict(os.environ)
    folder = tempfile.mkdtemp(prefix="ray")  # a test's own is too long for the names of sockets
    try:
        ray = pytest.importorskip("ray", reason="needs amortized[ray]")
        pytest.importorskip("pyarrow", reason="needs amortized[ray]")
        os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_USAGE_STATS_ENABLED": "0"}  # of its processes
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield ray
        ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.slow
def test_the_page_s_pipeline_writes_what_one_process_answers(cluster):
    solver = amortized.load("sphere")
    a = {name: leaf.numpy() for name, leaf in solver.data.batch("test", 0)._asdict().items()}
    n = len(a["offsets"])
    cluster.data.from_items([{name: leaf[row] for name, leaf in a.items()} for row in range(n)]).write_parquet(
        "contexts"
    )
    (code,) = blocks((DOCS / "scale.md").read_text(encoding="utf-8"), "python")
    exec(code, {"__name__": "scale"})
    found = cluster.data.read_parquet("solutions").to_pandas()
    assert len(found) == n
    contexts = {name: np.stack(list(found[name])) for name in a}
    order = np.lexsort(contexts["offsets"].T), np.lexsort(a["offsets"].T)
    for name, leaf in a.items():
        assert np.array_equal(contexts[name][order[0]], leaf[order[1]])
    answer = solver.solve(a, tol=0.05)
    assert np.allclose(np.stack(list(found["b"]))[order[0]], answer.b[order[1]], atol=1e-5)
    assert (found["path"].to_numpy()[order[0]] == answer.path[order[1]]).all()
    assert len(set(answer.path)) > 1

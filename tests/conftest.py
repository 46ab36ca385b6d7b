import os

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["PYTHONPATH"] = os.pathsep.join(
    map(os.path.dirname, [os.path.dirname(__file__), __file__])
)  # for other processes

import pytest
import sklearn.datasets  # noqa: F401  (as does this)
import torch

import amortized.cli.app  # noqa: F401  (what it imports sets environment variables, once)

torch.set_num_threads(1)  # forked processes can deadlock on a parent's thread pool


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device here"))


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(tmp_path):
    """Each test in a folder of its own; environment, random state and working directory are as before."""
    with pytest.MonkeyPatch.context() as patch:  # its own, which outlives what the test patches
        patch.chdir(tmp_path)
        patch.setenv("HOME", str(tmp_path))
        before = dict(os.environ)
        state = torch.get_rng_state()
        yield
        torch.set_rng_state(state)
        check_environment(before)


def check_environment(before):
    after = dict(os.environ)
    for name in ("PYTEST_CURRENT_TEST", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"):  # pytest's, and torch's compiler's
        before.pop(name, None), after.pop(name, None)
    changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    for key in changed:
        os.environ.pop(key, None) if key not in before else os.environ.update({key: before[key]})
    assert not changed, f"the test left environment variables changed: {sorted(changed)}"

"Settings of every test: offline, quiet, one thread; and the fixtures that several files use."
import gc
import os

os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', HF_HUB_DISABLE_PROGRESS_BARS='1',
                  TRANSFORMERS_VERBOSITY='error')

import pytest
import torch

# models of 10,000 weights gain nothing from a second thread, and wait for it where the other core is busy
torch.set_num_threads(1)


@pytest.fixture(scope='session')
def world():
    from mpo_nb.worlds import get_world
    return get_world('toy')


@pytest.fixture(scope='session')
def tok():
    "The toy world's word-level tokenizer: pad 0, EOS 1, no BOS"
    from util import toy_tokenizer
    return toy_tokenizer()


@pytest.fixture
def own_random_state():
    "A test that neither depends on nor changes the random numbers of others"
    from mpo_nb.sampling import seeded
    with seeded(0): yield


def pytest_collection_finish():
    "Every training collects garbage; half a million objects of imported modules are none, and took 0.3 s each time"
    gc.freeze()


# what workers take first: long files, and before the notebooks the models that many of these start from
FIRST = 'study', 'toy', 'pipeline', 'judge', 'ppo', 'dpo', 'human', 'colab', 'notebooks'
FOLDS = '14_gap', '16_noise'   # notebooks that need the same two reward models: the second reads them


@pytest.hookimpl(tryfirst=True)   # before xdist reads the groups
def pytest_collection_modifyitems(items):
    "A file stays on one worker, so that what its tests share is made once; each notebook is on its own"
    place = {f'test_{name}.py': i for i, name in enumerate(FIRST)}
    for i in items:
        group = i.path.name if 'test_notebook[' not in i.nodeid else i.nodeid
        if any(f'test_notebook[{n}]' in i.nodeid for n in FOLDS): group = 'folds'
        i.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda i: place.get(i.path.name, len(place)))

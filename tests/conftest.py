"Settings of every test: offline, quiet, one thread; and the fixtures that several files use."
import gc
import json
import os
import shutil
from pathlib import Path

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


@pytest.fixture(scope='module')
def no_pictures():
    "Runs of a file's tests write their pages without figures"
    from util import without_pictures
    with pytest.MonkeyPatch.context() as m: yield without_pictures(m.setattr)


@pytest.fixture(scope='session')
def two(tmp_path_factory):
    "Results of two_processes.py: (folder, one dict a process). `use_cpu` makes the backend gloo"
    from forks import run_on_two
    out = tmp_path_factory.mktemp('two')
    for p in run_on_two((Path(__file__).parent/'two_processes.py').read_text(), out):
        assert p.returncode == 0, p.stderr[-3000:]
    return out, [json.loads((out/f'results-{rank}.json').read_text()) for rank in (0, 1)]


def programs():
    "Paths of Chromium and its driver, or the reason why the browser test can't run"
    chrome = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    driver = shutil.which('chromedriver')
    missing = [n for n, p in (('chromium', chrome), ('chromedriver', driver)) if not p]
    return ((chrome, driver), f"{' and '.join(missing)} not installed (Debian: "
            f"apt-get install chromium chromium-driver)" if missing else None)


@pytest.fixture
def browser(tmp_path):
    "Chromium, driven; a test that needs it is skipped where it isn't"
    (chrome, driver), why = programs()
    if why: pytest.skip(why)
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for flag in ('headless=new', 'no-sandbox', 'disable-gpu', 'disable-dev-shm-usage',
                 'disable-background-networking', 'disable-component-update', 'disable-sync', 'no-first-run',
                 'window-size=1100,900', f'user-data-dir={tmp_path}/chrome'):
        options.add_argument(f'--{flag}')
    b = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield b
    b.quit()


def pytest_collection_finish():
    "Every training collects garbage; half a million objects of imported modules are none, and took 0.3 s each time"
    gc.freeze()


# what workers take first: long files, and before the notebooks the models that many of these start from
FIRST = 'study', 'toy', 'pipeline', 'judge', 'ppo', 'dpo', 'human', 'colab', 'notebooks'
# what is made for one of them serves the other: two reward models, two processes
TOGETHER = {'test_notebook[19_noise]': 'test_notebook[16_gap]', 'test_ppo_variants.py': 'test_ppo.py'}


@pytest.hookimpl(tryfirst=True)   # before xdist reads the groups
def pytest_collection_modifyitems(items):
    "A file stays on one worker, so that what its tests share is made once; each notebook is on its own"
    place = {f'test_{name}.py': i for i, name in enumerate(FIRST)}
    for i in items:
        group = i.name if i.name.startswith('test_notebook[') else i.path.name
        i.add_marker(pytest.mark.xdist_group(TOGETHER.get(group, group)))
    items.sort(key=lambda i: place.get(i.path.name, len(place)))

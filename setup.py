"Dependencies live in settings.ini; everything else setuptools needs is in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
setup(install_requires=cfg['DEFAULT']['requirements'].split(),
      extras_require={k: cfg['DEFAULT'][f'{k}_requirements'].split() for k in ('dev', 'docs', 'peft', 'judge')})

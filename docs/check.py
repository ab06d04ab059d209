"""Check the built site: `python docs/check.py build/site`

Every link leads somewhere, no page asks another host for anything, and on a phone (390 pixels wide, in headless
Chromium where there is one) no text scrolls sideways."""
import shutil
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

ASKED = dict(script='src', img='src', iframe='src', source='src', video='src', audio='src', embed='src', object='data')
WIDE = '''
const page = document.documentElement, beyond = e => e.getBoundingClientRect().right > innerWidth + 1
if (page.scrollWidth <= page.clientWidth) return null
return [...document.querySelectorAll("article *")].filter(beyond).slice(0, 3).map(e => e.outerHTML.slice(0, 90))'''


@cache
def page(path): return BeautifulSoup(path.read_text(encoding='utf-8'), 'html.parser')


@cache
def anchors(path): return {e.get('id') for e in page(path).find_all(id=True)}


def is_ours(url): return not urlsplit(url).scheme and not url.startswith('//')


def link_faults(path):
    for a in page(path).find_all('a', href=True):
        if not is_ours(a['href']): continue
        parts = urlsplit(a['href'])
        target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
        if not target.is_file(): yield f'link to {a["href"]}, which is not there'
        elif parts.fragment and target.suffix == '.html' and unquote(parts.fragment) not in anchors(target):
            yield f'link to {a["href"]}, and there is no such place on that page'


def request_faults(path):
    urls = [e[k] for tag, k in ASKED.items() for e in page(path).find_all(tag) if e.get(k)]
    urls += [e['href'] for e in page(path).find_all('link', href=True) if 'canonical' not in (e.get('rel') or [])]
    for url in urls:
        if url.startswith(('data:', '#')): continue
        if not is_ours(url): yield f'asks another host: {url[:80]}'
        elif not (path.parent/unquote(urlsplit(url).path)).is_file(): yield f'{url} is not there'


def phone_faults(paths):
    "Pages that are wider than a phone"
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    for a in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage'): options.add_argument(a)
    options.binary_location = shutil.which('chromium')
    options.add_experimental_option('mobileEmulation', dict(deviceMetrics=dict(width=390, height=844, pixelRatio=2)))
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which('chromedriver')))
    try:
        for path in paths:
            driver.get(path.resolve().as_uri())
            if wide := driver.execute_script(WIDE): yield path, f'wider than a phone: {wide}'
    finally: driver.quit()


def main(site):
    paths = sorted(p for p in site.rglob('*.html') if '_static' not in p.parts)
    found = [(p, f) for p in paths for check in (link_faults, request_faults) for f in check(p)]
    if shutil.which('chromium') and shutil.which('chromedriver'): found += phone_faults(paths)
    else: print('Chromium is not here: not checked on a phone')
    for p, f in found: print(f'{p.relative_to(site)}: {f}')
    print(f'{len(paths)} pages, {len(found)} faults')
    return 1 if found or not paths else 0


if __name__ == '__main__': sys.exit(main(Path(sys.argv[1])))

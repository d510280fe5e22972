# SPDX-License-Identifier: BSD-3-Clause
"""An evaluation as one page that a browser opens with nothing else needed. main.py -e --report DIR calls `write`."""
import base64
import html
import io
import json
import math
import os
from string import Template

import numpy as np
from PIL import Image

import images
from metrics import read_events

MOST_CELLS = 25     # classes a side, up to which the confusion matrix is drawn
MOST_PAIRS = 25     # rows of the table of confused pairs
MOST_MISTAKES = 24  # pictures

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --back: #fff; --front: #1b1f24; --soft: #5d6673; --line: #dde1e6; --card: #f6f7f9; --right: #2f6fb5; --wrong: #d0531f; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171b; --front: #e6e9ed; --soft: #9aa4b1; --line: #333a43; --card: #1d2127;
    --right: #6ea8e6; --wrong: #f0844f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--back); color: var(--front);
  font: 16px/1.5 system-ui, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { margin: .25rem 0 .75rem; color: var(--soft); overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.figures div { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; color: var(--soft); font-size: .9rem; }
.figures b { display: block; font-size: 1.6rem; line-height: 1.3; color: var(--front); font-variant-numeric: tabular-nums; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem 2rem;
  align-items: start; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--front); font: 11px system-ui, sans-serif; }
svg .soft { fill: var(--soft); }
svg .grid { stroke: var(--line); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem; }
figure { margin: 0; font-size: .85rem; line-height: 1.35; min-width: 0; overflow-wrap: anywhere; }
figure img { width: 100%; display: block; border-radius: .4rem; margin-bottom: .35rem; background: var(--card); }
figure i { font-style: normal; color: var(--wrong); font-weight: 600; }
figure small { color: var(--soft); display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.small img { image-rendering: pixelated; }
.scroll { max-height: 30rem; overflow-y: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, td.name, th.name { text-align: left; overflow-wrap: anywhere; }
thead th { position: sticky; top: 0; background: var(--card); font-weight: 600; line-height: 1.25; vertical-align: bottom; }
th button { all: unset; cursor: pointer; }
th button:hover, th button:focus-visible { text-decoration: underline; }
th[aria-sort] button::after { content: " ▾"; }
th[aria-sort=ascending] button::after { content: " ▴"; }
tr:last-child td { border-bottom: 0; }
td .bar { display: inline-block; width: 4rem; height: .5rem; margin-right: .5rem; border-radius: .25rem; vertical-align: middle;
  background: linear-gradient(90deg, var(--right) var(--share), var(--line) var(--share)); }
input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  padding: .3rem .6rem; margin-bottom: .5rem; width: 100%; max-width: 20rem; }
details { margin-top: 2.5rem; }
summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; }
@media (max-width: 40rem) {
  .pictures { grid-template-columns: repeat(3, 1fr); gap: .75rem; }
  td .bar, .wide { display: none; }
  th, td { padding: .3rem .35rem; }
}
</style>
<h1>$title</h1>
<p>$subtitle</p>
<div class="figures">$figures</div>
$curves
<h2>Most confident mistakes</h2>
$mistakes
<h2>Confusions</h2>
$confusions
<h2>Classes</h2>
$classes
<details><summary>Flags and versions</summary><table>$facts</table></details>
<script>
for (const button of document.querySelectorAll('th button')) button.onclick = () => {
  const head = button.parentNode, body = head.closest('table').tBodies[0], column = head.cellIndex;
  const up = head.ariaSort !== 'ascending';
  for (const other of head.parentNode.cells) other.removeAttribute('aria-sort');
  head.ariaSort = up ? 'ascending' : 'descending';
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const order = (a, b) => key(a) - key(b) || key(a).localeCompare(key(b), undefined, {numeric: true});
  body.append(...[...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)));
};
const filter = document.querySelector('#filter');
if (filter) filter.oninput = () => {
  for (const row of document.querySelectorAll('#classes tbody tr'))
    row.hidden = !row.textContent.toLowerCase().includes(filter.value.toLowerCase());
};
</script>
</html>
""")


def write(folder, *, title, source, classes, size, answers, result, facts, training_folders):
    """Write folder/index.html.

    source: the validation source (labels, validation_picture). answers: (2, images), the class that each image was given
    plus one (0: it was left out) and that answer's probability. result: (loss, acc1, acc5). facts: a dict of texts.
    training_folders: where the training's metrics.jsonl may be; its curves are shown.
    """
    labels, given, confidence = source.labels, answers[0].astype(np.int64) - 1, answers[1]
    seen = given >= 0
    count = len(classes)
    confusion = np.bincount(labels[seen] * count + given[seen], minlength=count * count).reshape(count, count)
    wrong = np.flatnonzero(seen & (given != labels))
    wrong = wrong[np.argsort(-confidence[wrong], kind='stable')]
    loss, acc1, acc5 = result
    right = int(np.trace(confusion))
    figures = [('{:.2f} %'.format(acc1), 'Acc@1'), ('{:.2f} %'.format(acc5), 'Acc@5'), ('{:.4f}'.format(loss), 'loss'),
               ('{:,}'.format(len(wrong)), 'wrong of {:,}'.format(right + len(wrong)))]
    page = PAGE.substitute(
        title=html.escape(title), subtitle=html.escape(', '.join(facts[key] for key in ('weights', 'data', 'machine'))),
        figures=''.join('<div><b>{}</b>{}</div>'.format(*figure) for figure in figures),
        curves=curves(training_folders),
        mistakes=mistakes(source, classes, size, wrong, given, confidence),
        confusions=confusions(confusion, classes), classes=class_table(confusion, classes),
        facts=''.join('<tr><td>{}</td><td class="name">{}</td></tr>'.format(html.escape(key), html.escape(str(value)))
                      for key, value in facts.items()))
    with open(os.path.join(folder, 'index.html'), 'w', encoding='utf-8', errors='replace') as file:
        file.write(page)


def percent(part, total):
    """As text that keeps to one line, and '–' of nothing."""
    return '{:.1f}\u00a0%'.format(100 * part / total) if total else '–'


def mistakes(source, classes, size, wrong, given, confidence):
    """The pictures of the most confident mistakes, as the network saw them."""
    shown, kind = [], 'png' if size <= 64 else 'jpeg'
    for index in wrong:
        if len(shown) == MOST_MISTAKES:
            break
        try:
            picture = source.validation_picture(index, size)
        except images.BadImage:  # it was read a minute ago
            continue
        content = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(picture)).save(content, kind, quality=88)
        name = os.path.basename(source.path(index)) if hasattr(source, 'path') else 'image {}'.format(index)
        shown.append(
            '<figure><img alt="" src="data:image/{};base64,{}">answered <i>{}</i>, {}<br>is <b>{}</b><small>{}</small>'
            '</figure>'.format(kind, base64.b64encode(content.getvalue()).decode(), html.escape(classes[given[index]]),
                               percent(confidence[index], 1), html.escape(classes[source.labels[index]]), html.escape(name)))
    if not shown:
        return '<p>None.</p>'
    return '<p>{} of {:,}, as the network saw them.</p><div class="pictures{}">{}</div>'.format(
        len(shown), len(wrong), ' small' * (kind == 'png'), ''.join(shown))


def confusions(confusion, classes):
    """The confusion matrix where it is small enough to be read, and the pairs most often confused."""
    off = confusion - np.diag(np.diag(confusion))
    pairs = [divmod(int(place), len(classes)) for place in np.argsort(-off, axis=None, kind='stable')[:MOST_PAIRS]]
    rows = ['<tr><td>{}</td><td class="name">{}</td><td>{:,}</td><td>{}</td></tr>'.format(
        html.escape(classes[true]), html.escape(classes[given]), off[true, given],
        percent(off[true, given], confusion[true].sum())) for true, given in pairs if off[true, given]]
    table = '<p>The pairs confused most often.</p><div class="scroll"><table><thead><tr><th>is<th class="name">answered' \
        '<th>images<th>of the class</tr></thead><tbody>{}</tbody></table></div>'.format(''.join(rows)) if rows else ''
    if len(classes) > MOST_CELLS:
        return table or '<p>None.</p>'
    return '<div class="two"><div>{}</div><div>{}</div></div>'.format(matrix(confusion, classes), table)


def matrix(confusion, classes):
    """The confusion matrix as SVG: a row for what is, a column for what was answered."""
    count = len(classes)
    names = [name if len(name) <= 14 else name[:13] + '…' for name in classes]
    longest = max(len(name.encode()) if name.isascii() else 2 * len(name) for name in names)
    margin, cell = 14 + 6.5 * min(longest, 15), max(18, min(34, 380 // count))
    top = 0.8 * margin if longest > 3 else 24
    parts = []
    for true in range(count):
        total = max(1, confusion[true].sum())
        middle = top + cell * true + cell / 2 + 4
        parts.append('<text class="soft" x="{}" y="{}" text-anchor="end">{}</text>'.format(
            margin - 6, middle, html.escape(names[true])))
        x = margin + cell * true + cell / 2
        turned = ' transform="rotate(-55 {0} {1})" text-anchor="start"'.format(x, top - 6) if longest > 3 \
            else ' text-anchor="middle"'
        parts.append('<text class="soft" x="{}" y="{}"{}>{}</text>'.format(x, top - 6, turned, html.escape(names[true])))
        for given in range(count):
            number = confusion[true, given]
            share = number / total
            parts.append(
                '<rect x="{:.1f}" y="{:.1f}" width="{w}" height="{w}" rx="3" fill="var(--{})" fill-opacity="{:.2f}">'
                '<title>{} answered as {}: {}</title></rect>'.format(
                    margin + cell * given + 1, top + cell * true + 1,
                    'line' if not number else 'right' if true == given else 'wrong',
                    0.25 if not number else 0.2 + 0.6 * share if true == given else 0.25 + 0.75 * math.sqrt(share),
                    html.escape(classes[true]), html.escape(classes[given]), number, w=cell - 2))
            if number and cell >= 24:
                parts.append('<text x="{}" y="{}" text-anchor="middle">{}</text>'.format(
                    margin + cell * given + cell / 2, middle, number))
    width, height = margin + cell * count + 30, top + cell * count
    return '<p>A row for what an image is, a column for the answer.</p><svg viewBox="0 0 {:.0f} {:.0f}" role="img" ' \
        'aria-label="Confusion matrix" style="max-width:{:.0f}px">{}</svg>'.format(width, height, 1.25 * width, ''.join(parts))


def class_table(confusion, classes):
    """A row a class, the worst first; sorted by a click on a heading, and searched where there are many."""
    totals, answered, hits = confusion.sum(1), confusion.sum(0), np.diag(confusion)
    accuracy = hits / np.maximum(totals, 1)
    rows = []
    for number in np.lexsort((-totals, accuracy)):
        number = int(number)
        others = confusion[number].copy()
        others[number] = 0
        most = int(others.argmax())
        rows.append(
            '<tr><td>{}</td><td data-value="{}">{:,}</td><td data-value="{}"><span class="bar" style="--share:{:.0f}%"></span>'
            '{}</td><td class="wide" data-value="{}">{}</td><td class="name">{}</td></tr>'.format(
                html.escape(classes[number]), totals[number], totals[number], accuracy[number], 100 * accuracy[number],
                percent(hits[number], totals[number]), hits[number] / max(1, answered[number]),
                percent(hits[number], answered[number]),
                html.escape('{} ({})'.format(classes[most], others[most])) if others[most] else ''))
    search = '<input id="filter" type="search" placeholder="find a class" aria-label="find a class">'
    heads = [('class', 'name'), ('images', ''), ('right', '" aria-sort="ascending'), ('answers right', 'wide'),
             ('most often taken for', 'name')]
    return '{}<div class="scroll" id="classes"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'.format(
        search if len(classes) > 20 else '',
        ''.join('<th class="{}"><button>{}</button></th>'.format(kind, name) for name, kind in heads), ''.join(rows))


# --- curves -----------------------------------------------------------------------------------------------------------

def curves(folders):
    """Loss and accuracy over the epochs, from the first folder with a training's metrics.jsonl; nothing without one."""
    for folder in folders:
        try:
            train, validate = read_events(folder)
        except (OSError, KeyError):
            continue
        if train:
            panels = [panel(title, [[(record['epoch'] + 1, record[key]) for record in records if record.get(key) is not None]
                                    for records in (train, validate)])
                      for title, key in (('Loss', 'loss'), ('Acc@1, %', 'acc1'))]
            return '<h2>Training</h2><div class="two">{}</div>'.format(''.join(panels))
    return ''


def panel(title, lines):
    """Two lines of (epoch, value), training and validation, as SVG."""
    width, height, left, bottom, top = 420, 230, 44, 200, 30
    points = [point for line in lines for point in line]
    if not points:
        return ''
    ticks = nice_ticks(min(value for _, value in points), max(value for _, value in points))
    first, last = min(epoch for epoch, _ in points), max(epoch for epoch, _ in points)

    def x(epoch):
        return left + (width - left - 12) * ((epoch - first) / (last - first) if last > first else 0.5)

    def y(value):
        return bottom - (bottom - top) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = ['<text x="0" y="14" style="font-weight:600;font-size:13px">{}</text>'.format(title)]
    for tick in ticks:
        parts.append('<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/><text class="soft" x="{}" y="{:.1f}" '
                     'text-anchor="end">{:g}</text>'.format(left, width - 12, left - 6, y(tick) + 4, tick, y=y(tick)))
    for epoch in sorted({round(first + (last - first) * part / 5) for part in range(6)}):
        parts.append('<text class="soft" x="{:.1f}" y="{}" text-anchor="middle">{}</text>'.format(x(epoch), bottom + 16, epoch))
    for number, (line, colour, name) in enumerate(zip(lines, ('right', 'wrong'), ('training', 'validation'))):
        if line:
            parts.append('<polyline fill="none" stroke="var(--{})" stroke-width="2" points="{}"/>'.format(
                colour, ' '.join('{:.1f},{:.1f}'.format(x(epoch), y(value)) for epoch, value in line)))
            if len(line) <= 30:
                parts += ['<circle cx="{:.1f}" cy="{:.1f}" r="2.5" fill="var(--{})"/>'.format(x(epoch), y(value), colour)
                          for epoch, value in line]
            parts.append('<rect x="{0}" y="5" width="10" height="10" rx="2" fill="var(--{1})"/>'
                         '<text class="soft" x="{2}" y="14">{3}</text>'.format(
                             width - 160 + 72 * number, colour, width - 146 + 72 * number, name))
    parts.append('<text class="soft" x="{}" y="{}" text-anchor="end">epoch</text>'.format(width - 12, height))
    return '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'.format(width, height + 4, title, ''.join(parts))


def nice_ticks(low, high):
    """Four to seven round numbers from below `low` to above `high`."""
    step = 10 ** math.floor(math.log10((high - low) or abs(high) or 1))
    while (high - low) / step > 5:
        step *= 2
    while (high - low) / step < 2.5:
        step /= 2
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [round(number * step, 10) for number in range(first, last + 1)]

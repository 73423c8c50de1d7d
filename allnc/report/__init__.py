"""One page about runs: `python -m allnc.report RUN... [--out report.html]`; a single HTML file, read without a network.

runs.py        what a run folder holds, and what its weights say where it holds too little
numbers.py     per-class accuracy, confusions and calibration from the predictions of a run
thumbnails.py  the images of a few mistakes
charts.py      curves, points, bars and heat maps as SVG
page.py        the parts of the page; page.html, style.css and script.js are their form
"""

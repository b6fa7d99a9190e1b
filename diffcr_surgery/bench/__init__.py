"""How much faster routing makes real denoisers: `python -m diffcr_surgery bench`, with random weights and nothing downloaded.

`run.py` reads as the story, the other files are its parts:

* `models.py`: the model families at their real sizes, built on the device, and the inputs their pipelines would pass.
* `hooks.py`: fewer tokens for the routed blocks, by hooks; and the limit, blocks on the first k tokens without router, gather or scatter.
* `sides.py`: what is compared, all on one set of weights.
* `measure.py`: latency in turns, peak memory, FLOPs, tokens that really entered the blocks.
* `report.py`: the rows compared, the table and `latency.png`.

Token merging stands in `recipes/baselines/token_merging.py`: it is what this package is compared with, and no part of it.
"""

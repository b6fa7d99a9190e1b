"""Does what DiffCR learns pay? Experiments over arms, targets, data sets and seeds, and the report made of them.

`python recipes/study --help` shows the commands. One experiment trains and measures one arm:

* `tasks.py`: the two data sets, their denoisers, and what samples are judged by.
* `arms.py`: what is compared, as data.
* `training.py`: the loop all arms share.
* `experiment.py`: one experiment, from the dense model to a record.
* `runner.py`: many experiments: cached, in several processes, in order.
* `report.py`: tables, curves and heat maps from the records.
"""

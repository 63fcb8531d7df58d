"""Studies: vary a configuration × seeds → runs → comparison. What `ablate.py` is made of.

variants.py: one configuration of a study; sizes.py: --match, equal N or FLOPs; planning.py: the command line → a StudyPlan
with all that will run; execution.py: the runs, one after the other or several at a time, resumable; tuning.py: --cross, each
variant at its best; effects.py: what each factor of a grid does; repetitions.py: --seeds=auto, how many seeds it takes; speed.py:
--speed, which variant is faster.
"""

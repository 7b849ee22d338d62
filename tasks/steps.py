"""The steps as Prefect tasks: plain functions first, seen in the UI second.

They take and return URLs and parameters, never arrays. Nothing is cached by Prefect: every step derives what
is left to do from what is stored.
"""

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import ablate, encode, evaluate, promotion, publish, sample, train, versions

sample_patches = task(name="sample patches", cache_policy=NO_CACHE)(sample.sample_patches)
train_model = task(name="train model", cache_policy=NO_CACHE)(train.train_model)
encode_database = task(name="encode database", cache_policy=NO_CACHE)(encode.encode_database)
publish_grid = task(name="publish grid", cache_policy=NO_CACHE)(publish.publish_grid)
evaluate_database = task(name="evaluate database", cache_policy=NO_CACHE)(evaluate.evaluate_database)
promote_evaluated = task(name="promote grid", cache_policy=NO_CACHE)(promotion.promote_evaluated)
prune_grids = task(name="prune grids", cache_policy=NO_CACHE)(versions.prune)
ablate_database = task(name="ablate database", cache_policy=NO_CACHE)(ablate.ablate_database)

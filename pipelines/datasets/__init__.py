"""Sources of raw logs. Importing registers every layout that Sluice reads."""

from __future__ import annotations

from pipelines.datasets import avazu as avazu
from pipelines.datasets import click_world as click_world
from pipelines.datasets import criteo as criteo
from pipelines.datasets import csv as csv
from pipelines.datasets import frappe as frappe
from pipelines.datasets import movielens_1m as movielens_1m
from pipelines.datasets import movielens_100k as movielens_100k
from pipelines.datasets import parquet as parquet
from pipelines.datasets import planted_orders as planted_orders
from pipelines.datasets import planted_populations as planted_populations
from pipelines.datasets import planted_shortcut as planted_shortcut
from pipelines.datasets import planted_values as planted_values
from pipelines.datasets import reczoo as reczoo

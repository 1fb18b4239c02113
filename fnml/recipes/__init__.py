"""Recipes: a configuration in, a finished run out."""

from fnml.recipes._config_json import from_json as from_json
from fnml.recipes._config_json import to_json as to_json
from fnml.recipes._memory import keep_memory as keep_memory
from fnml.recipes._plugins import Plugin as Plugin
from fnml.recipes._plugins import find_recipe as find_recipe
from fnml.recipes._plugins import load_plugin as load_plugin
from fnml.recipes._plugins import plugins as plugins
from fnml.recipes._plugins import recipe_names as recipe_names
from fnml.recipes._recipe import FLAT as FLAT
from fnml.recipes._recipe import Output as Output
from fnml.recipes._recipe import Recipe as Recipe
from fnml.recipes._recipe import RunConfig as RunConfig
from fnml.recipes._recipe import SampleConfig as SampleConfig
from fnml.recipes._recipe import Task as Task
from fnml.recipes._run import Finished as Finished
from fnml.recipes._run import Loaded as Loaded
from fnml.recipes._run import environment as environment
from fnml.recipes._run import evaluate as evaluate
from fnml.recipes._run import load as load
from fnml.recipes._run import resume as resume
from fnml.recipes._run import start as start
from fnml.recipes._run_directory import new_directory as new_directory
from fnml.recipes._run_directory import read_record as read_record
from fnml.recipes._run_directory import read_result as read_result

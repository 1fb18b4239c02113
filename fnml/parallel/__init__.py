"""Many devices: which parameters lie where, and pictures of it."""

from fnml.parallel._expert_moe import expert_moe as expert_moe
from fnml.parallel._initialize import initialize as initialize
from fnml.parallel._launch import launch as launch
from fnml.parallel._launch_options import Launch as Launch
from fnml.parallel._picture import Picture as Picture
from fnml.parallel._picture import Placed as Placed
from fnml.parallel._picture import picture as picture
from fnml.parallel._processes import Processes as Processes
from fnml.parallel._ring_attention import ring_attention as ring_attention
from fnml.parallel._rules import DATA as DATA
from fnml.parallel._rules import EXPERT as EXPERT
from fnml.parallel._rules import FSDP as FSDP
from fnml.parallel._rules import TENSOR as TENSOR
from fnml.parallel._rules import combine as combine
from fnml.parallel._rules import parse_rules as parse_rules
from fnml.parallel._spread import gathered as gathered
from fnml.parallel._spread import spread as spread

"""The zoo: models as pure functions over parameter trees, and the layers they are made of."""

if not __name__.startswith("fnml."):
    raise ImportError("import fnml.models: as a top-level module it would be a second copy")

from fnml.models._attention import causal_attention as causal_attention
from fnml.models._avg_pool2d import avg_pool2d as avg_pool2d
from fnml.models._avg_pool2d import global_mean as global_mean
from fnml.models._batch_norm import batch_norm as batch_norm
from fnml.models._batch_norm import batch_norm_state as batch_norm_state
from fnml.models._cnn import CNNConfig as CNNConfig
from fnml.models._cnn import cnn as cnn
from fnml.models._conv2d import conv2d as conv2d
from fnml.models._dropout import dropout as dropout
from fnml.models._embed import embed as embed
from fnml.models._encoder import EncoderConfig as EncoderConfig
from fnml.models._encoder import encoder as encoder
from fnml.models._gelu import gelu as gelu
from fnml.models._generate import generate as generate
from fnml.models._gpt import GPTConfig as GPTConfig
from fnml.models._gpt import gpt as gpt
from fnml.models._gpt_decode import gpt_cache as gpt_cache
from fnml.models._gpt_decode import gpt_decode as gpt_decode
from fnml.models._layer_norm import layer_norm as layer_norm
from fnml.models._linear import linear as linear
from fnml.models._linear import linears as linears
from fnml.models._max_pool2d import max_pool2d as max_pool2d
from fnml.models._mlp import MLPConfig as MLPConfig
from fnml.models._mlp import mlp as mlp
from fnml.models._moe import Routes as Routes
from fnml.models._moe import moe as moe
from fnml.models._moe import route as route
from fnml.models._moe import run_experts as run_experts
from fnml.models._resnet import ResNetConfig as ResNetConfig
from fnml.models._resnet import resnet as resnet
from fnml.models._rms_norm import rms_norm as rms_norm
from fnml.models._rope import Rotation as Rotation
from fnml.models._rope import rope as rope
from fnml.models._rope import rotate as rotate
from fnml.models._rope import rotation as rotation
from fnml.models._swiglu import swiglu as swiglu

# What training/__init__.py loads on first use; tests/pages/test_types.py compares the two.

from .callback import EditCallback as EditCallback
from .reference import Reference as Reference
from .reference import at_zero as at_zero
from .reference import store_reference as store_reference
from .responses import PreferenceTrainer as PreferenceTrainer
from .responses import ResponseTrainer as ResponseTrainer
from .responses import prefer as prefer
from .responses import sft as sft
from .rewards import RewardModel as RewardModel
from .rewards import fit_reward as fit_reward
from .sentences import GLUE as GLUE
from .sentences import TokenHead as TokenHead
from .sentences import classify as classify
from .sentences import pairs as pairs
from .sentences import regress as regress

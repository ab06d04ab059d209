"What most notebooks import, imported once; never mpo_nb itself"
import gc

import datasets, matplotlib.pyplot, nbdev.test, pandas, peft, scipy.stats, statsmodels.api, torch, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer
from trl import DPOTrainer, RewardTrainer, SFTTrainer

gc.freeze()   # see conftest: trainings collect garbage often

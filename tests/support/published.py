"""Arguments of the published functions, as the README of the original has them."""

MASK_ARGS = {
    "lr": 1e-3,
    "sparse_reg": 7,
    "weight_reg": 10.0,
    "temp_schedule_2_4": [4, 0.05],
    "scaler_schedule_2_4": [100, 500],
    "hard_2_4": False,
    "prior_strength_2_4": 3.0,
    "joint_optim": True,
    "temp_schedule_tile": [4, 0.05],
    "scaler_schedule_tile": [25, 350],
    "hard_tile": False,
    "prior_strength_tile": 3.0,
    "mask_llm": False,
    "layer_target": False,
    "optimizer": "adamw_torch",
    "target_sparsity_ratio": 0.45,
}

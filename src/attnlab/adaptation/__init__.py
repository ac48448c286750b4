"""Adaptation of a trained model as a change of its parameters: LoRA, prompts, federated averaging."""

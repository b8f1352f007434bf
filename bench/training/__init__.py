"""Training measured: what an edit learns beside LoRA, and what a step of preferences costs."""

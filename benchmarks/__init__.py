"""Programs that measure sdmodule: how well samples follow their prompts, and what each step costs."""

"""Training on a second text: what each method keeps of the first one."""

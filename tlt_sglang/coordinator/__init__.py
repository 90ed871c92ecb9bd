"""Who may train on which device, and when: engines report load, trainers are told."""

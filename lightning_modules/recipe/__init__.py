"""The recipe of the paper: classifier, optimizer, schedules, fine-tuning, distillation."""

"""Programs: a model's gradient, its metrics and its optimizer's step as pure graphs."""

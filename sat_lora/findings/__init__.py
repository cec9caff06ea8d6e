"""What a check or a verdict tells: findings with a code, a severity and what to do."""

"""Where a call goes: rules, arms, the reasoning and the efficiency path, and which replica takes it."""

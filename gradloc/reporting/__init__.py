"""What people see. `data` holds plain values; `findings` says the most useful things in words; the others draw."""

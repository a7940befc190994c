"""The methods: one module each, and the table of them (methods.table)."""

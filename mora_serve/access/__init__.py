"""Who may do what: keys, their roles and tenants, limits a tenant, and the audit log."""

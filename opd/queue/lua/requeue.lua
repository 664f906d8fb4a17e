-- Puts a dead letter back into its tenant's queue with a fresh delivery count and deadline; it is scored even when its
-- trainer is gone. ARGV: prefix, tenant, dead_id, body_ttl_ms. Returns the new entry id, gone, or queued (its trainer
-- has submitted the same rollout again meanwhile).

local tenant, dead_id, body_ttl_ms = ARGV[2], ARGV[3], ARGV[4]
local found = redis.call('XRANGE', key('dead', tenant), dead_id, dead_id)
if not found[1] then
  return 'gone'
end
local fields = as_table(found[1][2])
local slot = slot_of(fields.i, fields.r)
if known_entry(tenant, slot) then
  return 'queued'
end
if redis.call('PEXPIRE', key('body', tenant, fields.i, fields.r), body_ttl_ms) == 0 then
  return 'gone'
end
redis.call('DEL', key('reply', tenant, fields.i, fields.r))
local id = redis.call('XADD', key('requests', tenant), '*',
  'r', fields.r, 't', fields.t, 'i', fields.i, 'd', fields.d, 'a', fields.a, 'p', fields.p or '', 'k', '1')
remember(tenant, slot, id, fields.t)
redis.call('SADD', key('active'), tenant)
redis.call('XDEL', key('dead', tenant), dead_id)
if redis.call('XLEN', key('dead', tenant)) == 0 then
  redis.call('DEL', key('dead', tenant))
  redis.call('SREM', key('dead_tenants'), tenant)
end
push_wake()
return id

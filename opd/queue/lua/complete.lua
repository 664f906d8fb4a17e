-- Answers one delivered entry; a repeat, or a caller that lost its lease meanwhile, changes nothing.
-- ARGV: prefix, consumer, tenant, entry_id, incarnation, rollout_id, status, frame, reply_ttl_ms.
-- Returns done, not_ours (acknowledged before, or another replica holds it), withdrawn (the client took it back) or
-- dropped (the trainer is gone, nobody would read the reply).

local consumer, tenant, id = ARGV[2], ARGV[3], ARGV[4]
local incarnation, rollout_id = ARGV[5], ARGV[6]
local status, frame, reply_ttl_ms = ARGV[7], ARGV[8], ARGV[9]
local slot = slot_of(incarnation, rollout_id)

if not is_held_by(tenant, id, consumer) then
  return 'not_ours'
end
local fields = entry_at(tenant, id)
if not fields or known_entry(tenant, slot) ~= id then
  redis.call('XACK', key('requests', tenant), GROUP, id)
  redis.call('XDEL', key('requests', tenant), id)
  return 'withdrawn'
end
local is_wanted = fields.k or is_alive(tenant, incarnation)
redis.call('XACK', key('requests', tenant), GROUP, id)
redis.call('XDEL', key('requests', tenant), id)
redis.call('DEL', key('body', tenant, incarnation, rollout_id))
forget(tenant, slot)
if not is_wanted then
  count('dropped', 1)
  return 'dropped'
end
publish(tenant, fields, status, frame, reply_ttl_ms)
count(status == 'ok' and 'completed' or 'failed', 1)
if status == 'ok' then
  count('completed_tokens', tonumber(fields.t))
end
return 'done'

-- Puts one rollout into the queue; calling it again is safe at any time.
-- ARGV: prefix, tenant, incarnation, rollout_id, tokens, timeout_ms, attempt, prompt_hash, body, body_ttl_ms,
-- memory_fraction.
-- Returns {state, a, b}: unregistered (no heartbeat: nothing was done), replied, pending, accepted (a = entry id),
-- over_cap (a = cap, b = tokens in flight), backpressure (a = used bytes, b = maxmemory).

local tenant, incarnation, rollout_id = ARGV[2], ARGV[3], ARGV[4]
local tokens, timeout_ms, attempt = ARGV[5], ARGV[6], ARGV[7]
local prompt_hash, body, body_ttl_ms, memory_fraction = ARGV[8], ARGV[9], ARGV[10], tonumber(ARGV[11])
local slot = slot_of(incarnation, rollout_id)
local body_key = key('body', tenant, incarnation, rollout_id)

local function memory()
  local report = redis.call('INFO', 'memory')
  local used = tonumber(string.match(report, '\nused_memory:(%d+)'))
  local limit = tonumber(string.match(report, '\nmaxmemory:(%d+)'))
  return used, limit
end

if not is_alive(tenant, incarnation) then
  return {'unregistered', '', ''}
end
if redis.call('EXISTS', key('reply', tenant, incarnation, rollout_id)) == 1 then
  return {'replied', '', ''}
end
local known = known_entry(tenant, slot)
if known and entry_at(tenant, known) then
  if redis.call('EXISTS', body_key) == 0 and failed(redis.pcall('SET', body_key, body, 'PX', body_ttl_ms)) then
    return {'backpressure', '', ''}
  end
  return {'pending', known, ''}
end

local in_flight = tonumber(redis.call('HGET', key('inflight', tenant), 'tokens') or '0')
local limits = redis.call('HMGET', key('limits'), 'cap:' .. tenant, 'cap:*')
local cap = tonumber(limits[1] or limits[2] or '')
if cap and in_flight + tonumber(tokens) > cap then
  return {'over_cap', tostring(cap), tostring(in_flight)}
end
local used, limit = memory()
if limit > 0 and used + #body > limit * memory_fraction then
  return {'backpressure', tostring(used), tostring(limit)}
end

if failed(redis.pcall('SET', body_key, body, 'PX', body_ttl_ms)) then
  return {'backpressure', tostring(used), tostring(limit)}
end
forget(tenant, slot)
local id = redis.call('XADD', key('requests', tenant), '*',
  'r', rollout_id, 't', tokens, 'i', incarnation, 'd', timeout_ms, 'a', attempt, 'p', prompt_hash)
remember(tenant, slot, id, tokens)
redis.call('SADD', key('active'), tenant)
push_wake()
if redis.call('XLEN', key('requests', tenant)) == 1 then
  push(key('newcomers'))
end
return {'accepted', id, ''}

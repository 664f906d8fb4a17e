-- Shared by every script; prepended by opd/queue/scripts.py. ARGV[1] is the pool's key prefix, KEYS[1] a key of the
-- pool (for routing and access control). Key names follow opd/queue/keys.py; a test compares the two.
-- Out of memory, Redis refuses a script's growing writes only until its first write has gone through. A script that
-- adds to the queue starts with a growing write, so it fails as a whole; one that empties the queue starts with a
-- freeing write (XACK, XDEL, DEL), so it always goes through. Nothing is ever half done.

local PREFIX = ARGV[1]
local GROUP = 'pool'

local function key(name, ...)
  return PREFIX .. table.concat({name, ...}, ':')
end

local function failed(reply)
  return type(reply) == 'table' and reply.err ~= nil
end

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function id_ms(id)
  return tonumber(string.match(id, '^(%d+)'))
end

local function as_table(flat)
  local fields = {}
  for i = 1, #flat, 2 do
    fields[flat[i]] = flat[i + 1]
  end
  return fields
end

-- An entry's fields: r rollout id, t tokens, i incarnation, d timeout in ms, a attempt, p prompt hash (empty: no
-- siblings), k set when it was requeued.
local function entry_at(tenant, id)
  local found = redis.call('XRANGE', key('requests', tenant), id, id)
  return found[1] and as_table(found[1][2])
end

local function slot_of(incarnation, rollout_id)
  return incarnation .. '/' .. rollout_id
end

-- The entry id and token count that `entry` remembers of a rollout, or nil.
local function known_entry(tenant, slot)
  local value = redis.call('HGET', key('entry', tenant), slot)
  if not value then
    return nil
  end
  local id, tokens = string.match(value, '^(%S+) (%d+)$')
  return id, tonumber(tokens)
end

local function is_alive(tenant, incarnation)
  return redis.call('EXISTS', key('alive', tenant, incarnation)) == 1
end

-- Adds to a total; nothing is written for 0, which Redis would refuse when it is out of memory.
local function count(name, amount)
  if amount > 0 then
    redis.call('HINCRBY', key('counters'), name, amount)
  end
end

-- Wakes one waiting replica; the list stays short because a longer one would tell nobody more.
local function push(list)
  if redis.call('LLEN', list) < 16 then
    redis.pcall('LPUSH', list, '1')
  end
end

local function push_wake()
  push(key('wake'))
end

local function remember(tenant, slot, id, tokens)
  redis.call('HSET', key('entry', tenant), slot, id .. ' ' .. tokens)
  redis.call('HINCRBY', key('inflight', tenant), 'tokens', tokens)
  redis.call('HINCRBY', key('inflight', tenant), 'entries', 1)
end

-- Takes a rollout out of the tenant's books; counters move only together with the entry they counted.
local function forget(tenant, slot)
  local id, tokens = known_entry(tenant, slot)
  if not id then
    return
  end
  redis.call('HDEL', key('entry', tenant), slot)
  if redis.call('HINCRBY', key('inflight', tenant), 'entries', -1) <= 0 then
    redis.call('DEL', key('inflight', tenant))
  else
    redis.call('HINCRBY', key('inflight', tenant), 'tokens', -tokens)
  end
end

-- The pending record of an entry as {id, consumer, idle_ms, deliveries}, or nil.
local function pending_record(tenant, id)
  local found = redis.pcall('XPENDING', key('requests', tenant), GROUP, id, id, 1)
  return not failed(found) and found[1] or nil
end

local function is_held_by(tenant, id, consumer)
  local record = pending_record(tenant, id)
  return record ~= nil and record[2] == consumer
end

-- The frame of opd/queue/frames.py for an error that the queue itself found.
local function error_frame(code, message)
  return code .. '\n\n' .. message
end

-- Stores a reply and tells the trainer; both expire, so that a trainer that never comes back leaves nothing behind.
local function publish(tenant, fields, status, frame, ttl_ms)
  local stream = key('replies', tenant, fields.i)
  redis.call('SET', key('reply', tenant, fields.i, fields.r), frame, 'PX', ttl_ms)
  -- Its own stream, which a tenant may have made into something else: then it finds its reply by asking.
  redis.pcall('XADD', stream, '*', 'r', fields.r, 's', status)
  redis.pcall('PEXPIRE', stream, ttl_ms)
end

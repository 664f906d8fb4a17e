-- Leases entries to one replica: handed-back ones first, then new ones by deficit round robin over tenants.
-- ARGV: prefix, consumer, token_budget, max_entries, lease_ms, max_deliveries, num_held, quantum_tokens, reply_ttl_ms,
-- then tenant and tokens in turn: what the caller has scored for tenants that came to it directly.
-- Returns {deliveries, must_drain, is_charged}, the last telling whether those tokens went off the tenants' credit; a
-- delivery is {tenant, entry_id, rollout_id, incarnation, tokens, delivery_count,
-- age_ms, remaining_ms, attempt}. The tokens fit the budget, except that one entry larger than all of it comes alone.
-- A suspect (its lease ran out with a replica) comes alone and only to a replica that holds nothing: whoever goes down
-- with it takes nobody else's delivery count up. `must_drain` asks the caller to finish what it holds for that.
-- A budget of 0 says that the caller is full: then only tenants of whom it holds nothing are served, one entry each that
-- their next turn pays for, so that a newcomer need not wait until there is room again.
-- Behind an entry come, while its tenant's credit lasts, those of the same prompt among the next LOOKAHEAD, so that one
-- replica's prefix cache serves them all; then whoever was passed over is served first, so nobody is for long.

local consumer, token_budget, max_entries = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local lease_ms, max_deliveries, num_held = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local quantum_tokens, reply_ttl_ms = tonumber(ARGV[8]), tonumber(ARGV[9])
local MAX_TENANTS, MAX_RECLAIMS, MAX_DEAD_LETTERS, LOOKAHEAD, CHUNK, MAX_DEBT_ROUNDS = 128, 32, 1000, 32, 8, 64
local num_looks_left = 512
local now = now_ms()
local taken, spent_tokens, opened = {}, 0, {}
local spent_directly = {}
for i = 10, #ARGV, 2 do
  spent_directly[ARGV[i]] = tonumber(ARGV[i + 1])
end

local function fits(tokens)
  return #taken < max_entries and (#taken == 0 or spent_tokens + tokens <= token_budget)
end

local function deliver(tenant, id, fields, delivery_count)
  local age_ms = math.max(now - id_ms(id), 0)
  local tokens = tonumber(fields.t)
  taken[#taken + 1] = {tenant, id, fields.r, fields.i, tokens, delivery_count, age_ms,
    math.max(tonumber(fields.d) - age_ms, 0), tonumber(fields.a)}
  spent_tokens = spent_tokens + tokens
end

-- Takes an entry out of the queue for good; its body goes too unless it is kept as evidence.
local function remove(tenant, id, fields, keeps_body)
  local stream = key('requests', tenant)
  redis.call('XACK', stream, GROUP, id)
  redis.call('XDEL', stream, id)
  local slot = slot_of(fields.i, fields.r)
  if known_entry(tenant, slot) == id then
    forget(tenant, slot)
    if not keeps_body then
      redis.call('DEL', key('body', tenant, fields.i, fields.r))
    end
  end
end

-- Whether an entry is what `submit` writes: a tenant may add to its own stream without it.
local function is_entry(fields)
  for _, name in ipairs({'r', 'i'}) do
    if not string.match(fields[name] or '', '^[!-~]+$') or #fields[name] > 200 then
      return false
    end
  end
  for _, name in ipairs({'t', 'd', 'a'}) do
    if not string.match(fields[name] or '', '^%d+$') or #fields[name] > 10 then
      return false
    end
  end
  return tonumber(fields.t) > 0
end

-- Ends an entry that is none, that nobody waits for any more, or that waited too long; false when it is to be scored.
local function retire(tenant, id, fields)
  if not is_entry(fields) then
    redis.call('XACK', key('requests', tenant), GROUP, id)
    redis.call('XDEL', key('requests', tenant), id)
    count('malformed', 1)
    return true
  end
  if not fields.k and not is_alive(tenant, fields.i) then
    remove(tenant, id, fields)
    count('dropped', 1)
    return true
  end
  if id_ms(id) + tonumber(fields.d) >= now then
    return false
  end
  remove(tenant, id, fields)
  publish(tenant, fields, 'deadline_exceeded', error_frame('deadline_exceeded',
    'timeout_ms=' .. fields.d .. ': passed before a replica was free; raise it or add replicas'), reply_ttl_ms)
  count('expired', 1)
  return true
end

local function bury(tenant, id, fields, record)
  local dead = key('dead', tenant)
  redis.call('PERSIST', key('body', tenant, fields.i, fields.r))
  redis.call('XADD', dead, '*', 'r', fields.r, 't', fields.t, 'i', fields.i, 'd', fields.d, 'a', fields.a,
    'p', fields.p or '', 'n', record[4], 'c', record[2], 'e', id)
  redis.call('SADD', key('dead_tenants'), tenant)
  if redis.call('XLEN', dead) > MAX_DEAD_LETTERS then
    local oldest = redis.call('XRANGE', dead, '-', '+', 'COUNT', 1)[1]
    local old_fields = as_table(oldest[2])
    redis.call('DEL', key('body', tenant, old_fields.i, old_fields.r))
    redis.call('XDEL', dead, oldest[1])
  end
  remove(tenant, id, fields, true)
  publish(tenant, fields, 'dead_letter', error_frame('dead_letter', 'rollout_id=' .. fields.r .. ': put aside after '
    .. record[4] .. ' deliveries without an answer; see `opd pool dead list`'), reply_ttl_ms)
  count('dead', 1)
end

-- Sorts one tenant's lapsed leases into suspects and handed-back ones; cleans up what needs no scoring.
local function find_lapsed(tenant, suspects, returned)
  local lapsed = redis.pcall('XPENDING', key('requests', tenant), GROUP, 'IDLE', lease_ms, '-', '+', MAX_RECLAIMS)
  if failed(lapsed) then
    return -- No stream or no group yet.
  end
  for _, record in ipairs(lapsed) do
    local id = record[1]
    local fields = entry_at(tenant, id)
    local item = {tenant = tenant, id = id, fields = fields, deliveries = record[4]}
    if not fields then
      redis.call('XACK', key('requests', tenant), GROUP, id)
    elseif not retire(tenant, id, fields) then
      if record[4] == 0 then
        returned[#returned + 1] = item
      elseif record[4] < max_deliveries then
        suspects[#suspects + 1] = item
      else
        bury(tenant, id, fields, record)
      end
    end
  end
end

local function claim(item)
  redis.call('XCLAIM', key('requests', item.tenant), GROUP, consumer, 0, item.id)
  deliver(item.tenant, item.id, item.fields, item.deliveries + 1)
end

-- True when the caller is the one replica that is to run empty so that a suspect can be scored alone.
local function is_drainer()
  local drain = key('drain')
  local drainer = redis.call('GET', drain)
  if drainer and drainer ~= consumer then
    return false
  end
  return not failed(redis.pcall('SET', drain, consumer, 'PX', lease_ms))
end

-- The group's last delivered id and number of pending entries; makes the group where it is missing.
local function group_state(tenant)
  local stream = key('requests', tenant)
  local groups = redis.pcall('XINFO', 'GROUPS', stream)
  if failed(groups) then
    return nil
  end
  for _, flat in ipairs(groups) do
    local group = as_table(flat)
    if group.name == GROUP then
      return group['last-delivered-id'], group.pending
    end
  end
  if failed(redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0')) then
    return nil
  end
  return '0-0', 0
end

-- Appends the next entries of the stream to `queue.ahead`; of those, siblings pulled forward earlier are leased already.
local function read_on(queue)
  local stream = key('requests', queue.tenant)
  -- One entry tells whether there is work; more are read from a tenant that is being served.
  local chunk = redis.call('XRANGE', stream, '(' .. queue.seen, '+', 'COUNT', #queue.ahead == 0 and 2 or CHUNK)
  if not chunk[1] then
    queue.is_at_end = true
    return
  end
  queue.seen = chunk[#chunk][1]
  local leased = {}
  if queue.num_pending > 0 then
    local records = redis.call('XPENDING', stream, GROUP, chunk[1][1], queue.seen, queue.num_pending)
    for _, record in ipairs(records) do
      leased[record[1]] = true
    end
  end
  for _, entry in ipairs(chunk) do
    local fields = as_table(entry[2])
    queue.ahead[#queue.ahead + 1] =
      {id = entry[1], fields = fields, tokens = tonumber(fields.t), is_gone = leased[entry[1]]}
  end
end

local function look_at(queue, place)
  if place > #queue.ahead and not queue.is_at_end then
    read_on(queue)
  end
  return queue.ahead[place]
end

-- Moves `queue.head` to the tenant's first undelivered entry that is still wanted; nil at the end.
local function advance(queue)
  queue.head = nil
  while num_looks_left > 0 do
    local item = look_at(queue, queue.place + 1)
    if not item then
      return
    end
    num_looks_left = num_looks_left - 1
    if not item.is_gone and not retire(queue.tenant, item.id, item.fields) then
      queue.head = item
      return
    end
    queue.place, queue.passed = queue.place + 1, item.id
  end
end

-- What a tenant may still take, less what it had elsewhere since the last look: one account for both ways in.
local function credit_of(tenant, round_tokens)
  local deficit = tonumber(redis.call('HGET', key('deficits'), tenant) or '0')
  return math.max(deficit - (spent_directly[tenant] or 0), -MAX_DEBT_ROUNDS * round_tokens)
end

local function open_queue(tenant, last_delivered, num_pending)
  local queue = {tenant = tenant, seen = last_delivered, passed = last_delivered, num_pending = num_pending,
    ahead = {}, place = 0, leased = {}, is_granted = false}
  queue.weight = math.max(tonumber(redis.call('HGET', key('limits'), 'weight:' .. tenant) or '1'), 0.001)
  queue.deficit = credit_of(tenant, quantum_tokens * queue.weight)
  advance(queue)
  return queue
end

-- A tenant's queue, nil when it has nothing to take; a tenant without any entry leaves the books, its stream with it.
-- Opened when its turn comes: what is full after a few tenants must not look at all of them.
local function open(tenant)
  local last_delivered, num_pending = group_state(tenant)
  local queue = last_delivered and open_queue(tenant, last_delivered, num_pending)
  if queue and queue.head then
    opened[#opened + 1], opened[tenant] = queue, queue
    return queue
  end
  if redis.pcall('XLEN', key('requests', tenant)) == 0 and (num_pending or 0) == 0 then
    redis.call('DEL', key('requests', tenant))
    redis.call('SREM', key('active'), tenant)
    redis.call('HDEL', key('deficits'), tenant)
  end
  return nil
end

local function serve_item(queue, item)
  deliver(queue.tenant, item.id, item.fields, 1)
  item.is_gone = true
  queue.leased[#queue.leased + 1] = item.id
  queue.deficit = queue.deficit - item.tokens
end

-- Delivers what follows the head nearby and has the same prompt, as far as credit and budget go.
local function serve_siblings(queue)
  local prompt, head = queue.head.fields.p, queue.place + 1
  for place = head + 1, prompt and prompt ~= '' and head + LOOKAHEAD or 0 do
    local item = queue.deficit > 0 and #taken < max_entries and look_at(queue, place)
    if not item then
      return
    end
    local is_sibling = item.fields.p == prompt and not item.is_gone
    -- An entry that says no number of tokens is none, which `retire` will find.
    if is_sibling and (item.tokens or 0) <= queue.deficit and fits(item.tokens or 0) then
      if retire(queue.tenant, item.id, item.fields) then
        item.is_gone = true
      else
        serve_item(queue, item)
      end
    end
  end
end

-- Delivers from one queue while deficit and budget last; false when the budget, not the deficit, said stop.
local function serve(queue)
  while queue.head and queue.head.tokens <= queue.deficit do
    if not fits(queue.head.tokens) then
      return false
    end
    serve_item(queue, queue.head)
    serve_siblings(queue)
    advance(queue)
  end
  return true
end

-- Gives everybody, at once, the whole rounds after which the first head can be served: no loop for large entries.
local function skip_rounds(tenants)
  local num_rounds = math.huge
  for _, tenant in ipairs(tenants) do
    local queue = opened[tenant]
    local missing = queue.head.tokens - queue.deficit
    num_rounds = math.min(num_rounds, math.ceil(missing / (quantum_tokens * queue.weight)))
  end
  for _, tenant in ipairs(tenants) do
    local queue = opened[tenant]
    queue.deficit = queue.deficit + math.max(num_rounds - 1, 0) * quantum_tokens * queue.weight
  end
end

-- Deficit round robin; returns the tenant whose turn it is next and whether it already had this round's quantum.
local function run_rounds(tenants, turn, is_granted)
  local waiting, position, num_idle = {unpack(tenants)}, 1, 0
  while waiting[1] do
    local tenant = waiting[position]
    local queue = opened[tenant] or open(tenant)
    if queue then
      if not queue.is_granted and not (is_granted and tenant == turn) then
        queue.deficit = queue.deficit + quantum_tokens * queue.weight
      end
      queue.is_granted, is_granted = true, false
      local num_before = #queue.leased
      if not serve(queue) then
        return tenant, true
      end
      num_idle = #queue.leased == num_before and num_idle + 1 or 0
    end
    if queue and queue.head then
      queue.is_granted, position = false, position + 1
    else
      table.remove(waiting, position)
    end
    if queue and not queue.head then
      queue.deficit, num_idle = 0, 0
    end
    position = position > #waiting and 1 or position
    if waiting[1] and num_idle >= #waiting then
      skip_rounds(waiting)
      num_idle = 0
    end
  end
  return nil, false
end

local function holds_nothing_of(tenant)
  local found = redis.pcall('XPENDING', key('requests', tenant), GROUP, '-', '+', 1, consumer)
  return failed(found) or #found == 0
end

local function serve_newcomers(tenants)
  for _, tenant in ipairs(tenants) do
    local queue = #taken < max_entries and holds_nothing_of(tenant) and open(tenant)
    if queue and queue.head.tokens <= queue.deficit + quantum_tokens * queue.weight then
      serve_item(queue, queue.head)
      advance(queue)
      queue.deficit = queue.head and queue.deficit or 0
    end
  end
end

-- The active tenants in order of their names, from the one whose turn it is; and the one after those looked at.
local function tenants_in_turn(turn)
  local names = redis.pcall('SMEMBERS', key('active'))
  if failed(names) then
    -- A tenant has put something else there; whoever has work enters again with the next submission.
    redis.call('DEL', key('active'))
    names = {}
  end
  table.sort(names)
  local first = 1
  while turn and first <= #names and names[first] < turn do
    first = first + 1
  end
  local ordered = {}
  for i = 0, math.min(#names, MAX_TENANTS) - 1 do
    ordered[#ordered + 1] = names[(first - 1 + i) % #names + 1]
  end
  return ordered, #names > MAX_TENANTS and names[(first - 1 + MAX_TENANTS) % #names + 1] or nil
end

-- Leases what `run_rounds` chose. By XCLAIM with FORCE, because XREADGROUP knows no choice; LASTID keeps the group's
-- mark where it would stand: at the last entry before which all are delivered.
local function lease(tenants)
  for _, tenant in ipairs(tenants) do
    if spent_directly[tenant] and not opened[tenant] then
      open(tenant)
    end
  end
  for _, queue in ipairs(opened) do
    if #queue.leased > 0 then
      local command = {'XCLAIM', key('requests', queue.tenant), GROUP, consumer, 0, unpack(queue.leased)}
      for _, option in ipairs({'FORCE', 'JUSTID', 'RETRYCOUNT', 1, 'LASTID', queue.passed}) do
        command[#command + 1] = option
      end
      redis.call(unpack(command))
    end
    redis.pcall('HSET', key('deficits'), queue.tenant, string.format('%.3f', queue.deficit))
  end
end

local ring = redis.call('HMGET', key('ring'), 'turn', 'is_granted')
local tenants, after_tenants = tenants_in_turn(ring[1])
local suspects, returned = {}, {}
for _, tenant in ipairs(tenants) do
  find_lapsed(tenant, suspects, returned)
end
if suspects[1] and num_held == 0 then
  claim(suspects[1])
  redis.call('DEL', key('drain'))
  push_wake()
  count('redelivered', 1)
  return {taken, 0, 0}
end
if suspects[1] and is_drainer() then
  return {{}, 1, 0}
end
local is_full = token_budget == 0
for _, item in ipairs(returned) do
  if not is_full and fits(tonumber(item.fields.t)) then
    claim(item)
  end
end

if is_full then
  serve_newcomers(tenants)
  lease(tenants)
  count('delivered', #taken)
  return {taken, 0, 1}
end
local turn, has_quantum = run_rounds(tenants, ring[1], ring[2] == '1')
lease(tenants)
redis.pcall('HSET', key('ring'), 'turn', turn or after_tenants or '', 'is_granted', has_quantum and '1' or '0')
if turn or #returned > 0 or suspects[1] then
  push_wake()
elseif num_looks_left > 0 and not after_tenants then
  redis.call('DEL', key('wake'), key('newcomers'))
end
count('delivered', #taken)
return {taken, 0, 1}

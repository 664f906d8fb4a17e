-- Prolongs leases; the delivery count stays, and an entry that another replica took over stays with that one.
-- What nobody waits for any more (withdrawn, or its trainer is gone) is not prolonged either: `take` clears it away.
-- ARGV: prefix, consumer, then tenant and entry_id in turn. Returns 1 or 0 for each: still to be scored by the caller.

local consumer = ARGV[2]

local function is_wanted(tenant, id)
  local fields = entry_at(tenant, id)
  return fields and (fields.k or is_alive(tenant, fields.i))
end

local held = {}
for i = 3, #ARGV, 2 do
  local is_ours = is_held_by(ARGV[i], ARGV[i + 1], consumer) and is_wanted(ARGV[i], ARGV[i + 1])
  if is_ours then
    redis.call('XCLAIM', key('requests', ARGV[i]), GROUP, consumer, 0, ARGV[i + 1], 'JUSTID')
  end
  held[#held + 1] = is_ours and 1 or 0
end
return held

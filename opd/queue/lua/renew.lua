-- Prolongs leases; the delivery count stays, and an entry that another replica took over stays with that one.
-- ARGV: prefix, consumer, then tenant and entry_id in turn. Returns 1 or 0 for each: still held by the caller.

local consumer = ARGV[2]
local held = {}
for i = 3, #ARGV, 2 do
  local is_ours = is_held_by(ARGV[i], ARGV[i + 1], consumer)
  if is_ours then
    redis.call('XCLAIM', key('requests', ARGV[i]), GROUP, consumer, 0, ARGV[i + 1], 'JUSTID')
  end
  held[#held + 1] = is_ours and 1 or 0
end
return held

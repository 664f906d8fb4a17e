-- Gives delivered, unfinished entries to whoever takes next, at once and without counting this delivery.
-- ARGV: prefix, consumer, then tenant and entry_id in turn. Returns how many were handed back.

local consumer = ARGV[2]
local num_returned = 0
for i = 3, #ARGV, 2 do
  local record = pending_record(ARGV[i], ARGV[i + 1])
  if record and record[2] == consumer then
    -- Delivered at the epoch: idle for longer than any lease.
    redis.call('XCLAIM', key('requests', ARGV[i]), GROUP, consumer, 0, ARGV[i + 1],
      'TIME', 1, 'RETRYCOUNT', math.max(record[4] - 1, 0), 'JUSTID')
    num_returned = num_returned + 1
  end
end
if num_returned > 0 then
  push_wake()
end
return num_returned

-- A client no longer wants these rollouts (cancelled, past their deadline, closing): frees their share of the cap.
-- A replica that is scoring one of them finds its entry gone when it completes, and writes nothing.
-- ARGV: prefix, tenant, incarnation, rollout_id... Returns how many entries were removed.

local tenant, incarnation = ARGV[2], ARGV[3]
local num_removed = 0
for i = 4, #ARGV do
  local slot = slot_of(incarnation, ARGV[i])
  redis.call('DEL', key('reply', tenant, incarnation, ARGV[i]), key('body', tenant, incarnation, ARGV[i]))
  local id = known_entry(tenant, slot)
  if id then
    num_removed = num_removed + redis.call('XDEL', key('requests', tenant), id)
    forget(tenant, slot)
  end
end
return num_removed

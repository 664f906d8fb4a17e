-- Tells what the queue knows of rollouts, without a body and without writing: what a client asks after a reconnect.
-- ARGV: prefix, tenant, incarnation, rollout_id... Returns for each replied, pending or absent.

local tenant, incarnation = ARGV[2], ARGV[3]

local function state_of(rollout_id)
  if redis.call('EXISTS', key('reply', tenant, incarnation, rollout_id)) == 1 then
    return 'replied'
  end
  local id = known_entry(tenant, slot_of(incarnation, rollout_id))
  local is_whole = id and entry_at(tenant, id) and redis.call('EXISTS', key('body', tenant, incarnation, rollout_id)) == 1
  return is_whole and 'pending' or 'absent'
end

local states = {}
for i = 4, #ARGV do
  states[#states + 1] = state_of(ARGV[i])
end
return states

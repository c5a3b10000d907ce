-- Lets a request pass that carries the key of GATEWAY_KEY_FILE as `authorization: Bearer KEY`, and questions about health.
-- Envoy does not start without the key, because an edge that is open by mistake looks like one that works.
local path = os.getenv("GATEWAY_KEY_FILE") or "/secrets/gateway_key"
local file = io.open(path)
local key = file and file:read("*l") or ""
if file then file:close() end
if not key:match("^[%w_-]+$") or #key < 16 then
    error("GATEWAY_KEY_FILE must hold at least 16 letters, digits, - or _, got " .. #key .. " characters in " .. path
        .. "; hint: openssl rand -hex 32 > " .. path)
end
local expected = "Bearer " .. key
local open = {
    ["/inference.GRPCInferenceService/ServerLive"] = true,
    ["/inference.GRPCInferenceService/ServerReady"] = true,
    ["/v2/health/live"] = true,
    ["/v2/health/ready"] = true,
}

-- Takes as long for a wrong key as for the right one, so that time tells nothing about it.
local function equal(given)
    local difference = #given == #expected and 0 or 1
    for index = 1, #expected do
        if given:byte(index) ~= expected:byte(index) then difference = difference + 1 end
    end
    return difference == 0
end

function envoy_on_request(request)
    local headers = request:headers()
    if open[(headers:get(":path") or ""):match("^[^?]*")] then return end
    if equal(headers:get("authorization") or "") then
        headers:remove("authorization") -- the servers need not know it
        return
    end
    request:respond({[":status"] = "401", ["www-authenticate"] = "Bearer"}, "authorization must be Bearer KEY\n")
end
